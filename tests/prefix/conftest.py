"""What tests of prefixes count."""

import pytest


@pytest.fixture
def run_through():
    """Gives a function that counts, from then on, the tokens that go through a model."""
    hooks = []

    def count(model):
        tokens = []

        def note(module, args, kwargs):
            ids = args[0] if args else kwargs["input_ids"]
            mask = kwargs.get("attention_mask")
            if isinstance(mask, dict):
                mask = next(iter(mask.values()))
            tokens.append(ids.numel() if mask is None else int(mask[:, -ids.shape[1] :].sum()))

        hooks.append(model.get_decoder().register_forward_pre_hook(note, with_kwargs=True))
        return tokens

    yield count
    for hook in hooks:
        hook.remove()

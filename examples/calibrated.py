"""Measures in which directions a model's keys vary, and packs a text in them: python examples/calibrated.py"""

import pydoc_data.topics

from kvcompress import GEARCache, load_model, measure_basis


def main(new_tokens: int = 32) -> GEARCache:
    model, tokenizer = load_model()
    # a few thousand tokens of what is to come are better: kvcompress calibrate FILE... --out basis.safetensors
    texts = [pydoc_data.topics.topics[name] for name in ("try", "with")]
    basis = measure_basis(model, [tokenizer(text, return_tensors="pt").input_ids for text in texts])
    cache = GEARCache(model, bits=2, basis=basis)
    question = pydoc_data.topics.topics["for"] + "\nIn one sentence: what is this about?"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, cache=cache, max_new_tokens=new_tokens, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(cache.memory())
    return cache


if __name__ == "__main__":
    main()

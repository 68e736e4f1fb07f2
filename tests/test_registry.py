"""Methods by name: what is registered, what a spec means, and what others add."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress
from kvcompress import H2O, TOVA, DenseCache, EvictingCache, Policy, ShadowKVCache, SnapKV, register, registry
from kvcompress.check.caches import known_caches
from kvcompress.evals.sweep import baselines
from kvcompress.evals.sweep.rows import read_rows
from kvcompress.plan import make_plan, read_shape
from kvcompress.policies.method import LISTED, RESERVED
from tests.contract.models import tiny

ROOT = Path(__file__).parents[1]
MINE = '''
from dataclasses import dataclass
from kvcompress import CompressedCache, DenseCache, Policy

@dataclass(frozen=True, kw_only=True)
class Oldest(Policy):
    """The oldest tokens.

    bias: has no effect.
    """
    bias: float = 0.0

    def score(self, candidates):
        return -candidates.positions.float()

@dataclass(frozen=True, kw_only=True)
class Weighted(Oldest):
    weight: float
    bits: int = 8
    label: str = "x"
    least: int | None = 3
    rolled: bool = False

    def __post_init__(self):
        if self.label == "wrong":
            raise TypeError("an argument of mine")

class Full(DenseCache):
    """All of them."""

    class Within(DenseCache):
        pass

number = 3
'''

NAMED = """
from kvcompress import Policy, register

@register("first", "as Oldest")
class Named(Policy):
    def score(self, candidates):
        return -candidates.positions.float()
"""


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a module of a user's, in which a command is run."""
    (tmp_path / "my_policies.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_policies", raising=False)
    yield tmp_path
    sys.modules.pop("my_policies", None)


@pytest.fixture
def listed(monkeypatch):
    """What is registered meanwhile is forgotten."""
    before = dict(LISTED)
    yield
    LISTED.clear()
    LISTED.update(before)


def test_every_name_builds_a_cache(model):
    for name, method in registry.METHODS.items():
        cache = registry.build(name, model, 64)
        assert isinstance(cache, EvictingCache) == (method.takes_budget and not method.reads_budget)
        assert isinstance(cache, ShadowKVCache) == method.reads_budget
        assert isinstance(cache, DenseCache) == (name == "none")


def test_a_policy_is_registered_by_its_own_file_alone():
    policies = {method.kind for method in registry.METHODS.values() if issubclass(method.kind, Policy)}
    assert {kind.__module__ for kind in policies} == {
        f"kvcompress.policies.{file.stem}"
        for file in (ROOT / "policies").glob("*.py")
        if "\n@register(\n" in file.read_text() or '\n@register("' in file.read_text()
    }
    assert {kind.__name__ for kind in policies} <= set(kvcompress.__all__)
    assert all(getattr(kvcompress, kind.__name__) is kind for kind in policies)


# README: `--cache` and `--methods` take the names above but the last two, with settings as in `h2o:sinks=4`
def test_settings_go_to_the_policy_and_the_cache(model):
    cache = registry.build("h2o:sinks=4:recent=0.25:allocation=pyramid", model, 64)
    assert (cache.policy.sinks, cache.policy.recent, cache.allocation) == (4, 0.25, "pyramid")


def test_a_budget_in_a_spec_counts_before_the_one_beside(model):
    assert registry.build("h2o:budget=0.3", model, 64).budget == 0.3
    assert registry.build("shadowkv:budget=32", model).budget == 32


def test_a_spec_has_one_spelling():
    assert registry.canonical("h2o:sinks=4:recent=0.25") == registry.canonical(" h2o:recent=0.25:sinks=4")
    assert registry.canonical("full") == registry.canonical("dense") == "none"
    assert registry.canonical("SnapKV:sinks=4") == registry.canonical("snapkv:sinks=4")
    assert registry.canonical("streaming_llm") == "streaming"


def test_a_setting_by_its_old_name_is_the_same_in_specs_and_recorded_rows(model, tmp_path):
    assert registry.build("h2o:rolled=true", model, 64).rerotated
    assert registry.canonical("h2o:rolled=true:sinks=4") == "h2o:rerotated=True:sinks=4"
    (tmp_path / "results.jsonl").write_text('{"key": "a", "method": "h2o:rolled=True:sinks=4"}\n{"key": "b"}\n')
    assert [row.get("method") for row in read_rows(tmp_path).values()] == ["h2o:rerotated=True:sinks=4", None]


def test_usual_stands_for_what_a_sweep_measures_unless_told():
    names = registry.expanded(["none", "Usual"])
    assert names[0] == "none"
    assert {"h2o", "random", "gear", "kivi"} < set(names)
    assert not {"hydragen", "shadowkv"} & set(names)


@pytest.mark.parametrize(
    ("spec", "budget", "message"),
    [
        ("h3o", 64, r"unknown method 'h3o'; did you mean h2o[?] known: none, .*h2o, .*, or module:Class of your own"),
        ("h2o:sinks", 64, "settings must be written as h2o:setting=value, got 'h2o:sinks'"),
        ("h2o:sinks=", 64, "settings must be written as h2o:setting=value, got 'h2o:sinks='"),
        ("h2o:sinks=abc", 64, "the method h2o takes as sinks a whole number, got 'abc'"),
        ("h2o:sinks=0.5", 64, "the method h2o takes as sinks a whole number, got '0.5'"),
        ("h2o:sinks=true", 64, "the method h2o takes as sinks a whole number, got 'true'"),
        ("h2o:sinks=4:recent", 64, "the method h2o takes as sinks a whole number, got '4:recent'"),
        ("h2o:recent=nan", 64, "the method h2o takes as recent a number, got 'nan'"),
        ("h2o:rerotated=no", 64, "the method h2o takes as rerotated true or false, got 'no'"),
        ("h2o:allocation=flat", 64, "the method h2o takes as allocation 'uniform', .* got 'flat'"),
        ("h2o:outliers=abc", 64, "the method h2o takes as outliers a number, got 'abc'"),
        ("expected:covariance=off", 64, "the method expected takes as covariance true or false, got 'off'"),
        ("snapkv:pooling=mean", 64, "the method snapkv takes as pooling 'avg' or 'max', got 'mean'"),
        ("kvzip:prompt=abc", 64, "the method kvzip takes as prompt tuple"),
        ("gear:preset=3:rank=x", 64, "the method gear takes as rank a whole number, got 'x'"),
        ("hydragen:attention_mask=3", 64, "the method hydragen takes as attention_mask Tensor or none, got '3'"),
        ("h2o:sinks=1:sinks=2", 64, "sinks must be given once, got 'h2o:sinks=1:sinks=2'"),
        ("h2o:rolled=true:rerotated=false", 64, "rerotated must be given once"),
        ("shadowkv:host=mmap:/tmp:rank=x", 64, "the method shadowkv takes as rank a whole number or none, got 'x'"),
        (":Mine", 64, "a class of your own must be written as module:Class, .* got ':Mine'"),
        (".x:Mine", 64, "a class of your own must be written as module:Class, .* got '.x:Mine'"),
        ("kvcompress:Policy", 64, "kvcompress:Policy must be a Policy or a CompressedCache"),
        ("kvcompress:CompressedCache", 64, "kvcompress:CompressedCache must be a Policy or a CompressedCache"),
        ("kvcompress:EvictingCache", 64, "the method kvcompress:EvictingCache needs policy"),
        ("my_policies:Weighted", 64, "the method my_policies:Weighted needs weight: my_policies:Weighted:weight=..."),
        ("my_policies:Weighted:sinks=2", 64, "the method my_policies:Weighted needs weight"),
        (
            "my_policies:Weighted:weight=2:bits=4",
            64,
            "bits may be Weighted's or the cache's: give the policy's setting",
        ),
        (
            "h2o:size=1",
            64,
            "the method h2o does not take these settings: size; it takes budget, recent, .*hadamard$",
        ),
        (
            "h2o:sink=1",
            64,
            "the method h2o does not take these settings: sink; did you mean sinks.* It takes budget, ",
        ),
        ("h2o:budgte=3", 64, "the method h2o does not take these settings: budgte; did you mean budget[?] It takes"),
        ("none:budget=3", None, "the method none does not take these settings: .*budget"),
        ("h2o", None, "the method h2o needs a budget"),
        ("h2o:sinks=-1", 64, "sinks must be 0 tokens or more"),
        ("h2o:budget=half", 64, "budget must be a count of tokens such as 512, or a fraction such as 0.2, got 'half'"),
        ("nowhere.at_all:Mine", 64, "unknown method 'nowhere.at_all:Mine'; .* there is no module 'nowhere.at_all'"),
        ("my_policies:Newest", 64, "my_policies:Newest must be a Policy or a CompressedCache, got None"),
        ("my_policies:number", 64, "my_policies:number must be a Policy or a CompressedCache, got 3"),
        ("my_policies:Oldest:size=1", 64, "the method my_policies:Oldest does not take these settings: .*size"),
        ("my_policies:Oldest", None, "the method my_policies:Oldest needs a budget"),
    ],
)
def test_mistakes_are_named(model, spec, budget, message, mine):
    with pytest.raises(ValueError, match=message):
        registry.build(spec, model, budget)


def test_a_module_that_lacks_another_says_which(mine):
    (mine / "my_policies.py").write_text("import no_such_library")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        registry.parse("my_policies:Oldest")


@pytest.mark.parametrize("setting", ["basis=b.safetensors", "preset=gear"])
def test_kivi_takes_no_basis_and_is_no_other_preset(setting):
    name = setting.partition("=")[0]
    with pytest.raises(ValueError, match=f"the method kivi does not take these settings: {name}; .*[iI]t takes bits, "):
        registry.parse(f"kivi:{setting}")
    assert registry.parse(f"gear:{setting}")[1] == {name: setting.partition("=")[2]}


# docs: There a class of your own is `my_policies:MyPolicy`
def test_a_class_of_ones_own_is_a_method_by_where_it_is(model, mine):
    cache = registry.build("my_policies:Oldest:bias=1:recent=3:bits=4", model, 8)
    assert (type(cache.policy).__name__, cache.policy.bias, cache.policy.recent, cache.packed.bits) == (
        "Oldest",
        1,
        3,
        4,
    )
    assert registry.canonical("my_policies:Oldest:recent=3:bias=1") == "my_policies:Oldest:bias=1:recent=3"
    assert registry.parse("my_policies:Oldest")[0].about == "The oldest tokens."
    assert type(registry.build("my_policies:Full", model)).__name__ == "Full"
    assert registry.parse("kvcompress.policies.tova:TOVA")[0].kind is TOVA


def test_a_setting_is_read_as_the_type_that_it_declares(model, mine):
    policy = registry.build("my_policies:Weighted:weight=1:label=007:least=none:rolled=True", model, 8).policy
    assert (policy.weight, policy.label, policy.least, policy.rolled, policy.bits) == (1, "007", None, True, 8)
    assert registry.build("my_policies:Weighted:weight=1:label=a=b:c", model, 8).policy.label == "a=b:c"
    assert type(registry.build("my_policies:Full.Within", model)).__name__ == "Within"
    # an error of the class's own says what it says
    with pytest.raises(TypeError, match="^an argument of mine$"):
        registry.build("my_policies:Weighted:weight=1:label=wrong", model, 8)


def test_a_host_of_a_spec_may_be_a_folder(model, tmp_path):
    assert registry.build(f"shadowkv:host=mmap:{tmp_path}:rank=2", model, 64).layers[0].host == f"mmap:{tmp_path}"


def test_a_command_finds_a_class_in_the_folder_that_it_runs_in(mine, monkeypatch):
    # as the installed command is started: its own folder is first on the path, not the one it runs in
    others = [place for place in sys.path if Path(place).resolve() != mine.resolve()]
    monkeypatch.setattr(sys, "path", [str(mine / "bin"), *others])
    assert registry.canonical("my_policies:Oldest:budget=0.30") == "my_policies:Oldest:budget=0.3"


def test_what_plan_can_size_is_what_follows_a_policy(mine, model):
    model.save_pretrained(mine / "model")
    shape = read_shape(str(mine / "model"))
    own, tova = make_plan(shape, ["my_policies:Oldest:budget=20", "tova"], 100, 2, 0.2, torch.float16)
    assert (own.budget, own.cache) == (20, tova.cache)
    for spec, budget, message in (
        (
            "my_policies:Full",
            0.2,
            "plan knows the sizes of policies and of kvcompress's own caches, not of my_policies",
        ),
        ("snapkv", 8, "budget must be at least sinks .* = 33 tokens for SnapKV"),
        ("shadowkv", 4, "budget must be at least one chunk = 8 tokens, got 4"),
        ("shadowkv:fod=3", 64, "the method shadowkv does not take these settings: fod"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan(shape, [spec], 100, 2, budget, torch.float16)


def test_a_name_belongs_to_one_class(listed):
    class Mine(H2O):
        pass

    register("mine", "anything", aliases=("own",))(Mine)
    assert registry.canonical("Own:sinks=2") == "mine:sinks=2"
    # a cell of a notebook that runs again
    register("mine", "anything else")(Mine)
    assert registry.parse("mine")[0].about == "anything else"
    with pytest.raises(
        ValueError, match=r"the name 'h2o' belongs to kvcompress.policies.h2o.H2O; register .*Mine under"
    ):
        register("h2o", "anything")(Mine)
    # an alias is a name too, and an older one's
    register("mine", "anything", aliases=("mine2",))(Mine)
    with pytest.raises(ValueError, match=r"the name 'mine2' belongs to .*Mine; register .*Other under"):
        register("mine2", "anything")(type("Other", (Mine,), {}))
    assert "mine2" not in LISTED


@pytest.mark.parametrize(
    "name", ["my:h2o", "My", "", " ", "a b", "a\nb", "a|b", "a=b", "a,b", "[red]", "-x", "x-", "é"]
)
def test_a_name_is_letters_digits_and_a_few_signs(name, listed):
    for facts in ({"name": name}, {"name": "mine", "aliases": (name,)}):
        with pytest.raises(ValueError, match="a method's name must be letters in lower case and digits") as told:
            register(about="anything", **facts)
        assert repr(name) in str(told.value)


def test_kvcompresss_own_names_stay_its_own_whoever_registers_first(listed, fresh):
    assert {*baselines.METHODS, *known_caches(), registry.USUAL} - {*LISTED} <= RESERVED
    names = {name for each in LISTED.values() for name in (each.name, *each.aliases)}
    assert names <= RESERVED | {name for each in LISTED.values() if issubclass(each.kind, Policy)
                                for name in (each.name, *each.aliases)}  # fmt: skip
    for name in (*RESERVED, *names):
        with pytest.raises(ValueError, match=f"the name '{name}' (is kvcompress's own|belongs to kvcompress)"):
            register(name, "anything")(type("Mine", (H2O,), {}))
    code = """
from kvcompress import Policy, register
class Mine(Policy):
    def score(self, candidates):
        return candidates.scores
for name in ("h2o", "tova", "gear", "none", "dense", "expected_attention"):
    try:
        register(name, "mine")(Mine)
    except ValueError as error:
        print(error)
from kvcompress import H2OCache, registry
print(registry.METHODS["h2o"].kind.__name__)
"""
    done = fresh(code)
    assert done.stdout.splitlines()[-1] == "H2O", done.stderr
    assert len(done.stdout.splitlines()) == 7


def test_what_is_registered_is_a_policy_with_a_score_or_a_cache(listed):
    before = dict(LISTED)
    for kind in (object, lambda: 1, 3):
        with pytest.raises(TypeError, match="'mine' must be a Policy or a CompressedCache, got"):
            register("mine", "anything")(kind)
    with pytest.raises(ValueError, match=r"the policy .*Blank must define score\(candidates\)"):
        register("mine", "anything")(type("Blank", (Policy,), {}))
    assert before == LISTED


# docs: Packages name theirs in the entry point group `kvcompress.methods`
def test_methods_of_installed_packages_are_listed_by_their_entry_points(model, mine, monkeypatch, listed):
    values = {"oldest": "my_policies:Oldest", "broken": "nowhere:Mine", "number": "my_policies:number"}
    values |= {"half": "half_done", "exits": "exits", "dense": "my_policies:Weighted", "second": "named:Named"}
    values |= {"looks": "looks:Looks", "module": "my_policies"}
    (mine / "half_done.py").write_text(f"{NAMED}\nraise RuntimeError('half')")
    (mine / "exits.py").write_text("raise SystemExit(3)")
    (mine / "named.py").write_text(NAMED)
    (mine / "looks.py").write_text(f"from kvcompress.registry import METHODS\n{MINE}\nclass Looks(Oldest): pass")
    points = [EntryPoint(name, value, registry.GROUP) for name, value in values.items()]
    monkeypatch.setattr(sys, "path", [str(mine), *sys.path])
    monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in points if group == registry.GROUP])
    with pytest.warns(UserWarning, match="is skipped") as caught:
        registry._import_installed()
    for name in ("half_done", "exits", "named", "looks"):
        sys.modules.pop(name, None)
    assert registry.build("oldest:bias=2", model, 8).policy.bias == 2
    # registered by itself under one name, installed under another
    assert registry.canonical("second:recent=2") == registry.canonical("first:recent=2") == "first:recent=2"
    assert "looks" in registry.METHODS
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 5
    assert "the method 'broken' of an unknown package (kvcompress.methods: nowhere:Mine) is skipped" in texts[0]
    assert "expected a Policy, a CompressedCache or a module that registers some, got 3" in texts[1]
    assert "the method 'half' of an unknown package (kvcompress.methods: half_done) is skipped: RuntimeErr" in texts[2]
    assert "the method 'exits' of an unknown package (kvcompress.methods: exits) is skipped: SystemExit: 3" in texts[3]
    assert "the name 'dense' is kvcompress's own" in texts[4]
    assert not {"broken", "number", "module", "dense", "exits", "half"} & set(registry.METHODS)
    assert registry.METHODS["first"].kind.__module__ == "named"
    assert registry.parse("dense")[0].kind is DenseCache


def test_an_installed_method_may_import_the_registry_first(mine, fresh):
    (mine / "looks.py").write_text(f"from kvcompress import registry\n{MINE}\nclass Looks(Oldest): pass")
    metadata = mine / "looks-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: looks\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[kvcompress.methods]\nlooks = looks:Looks\n")
    code = "import looks; from kvcompress.registry import METHODS; print(METHODS['looks'].kind is looks.Looks)"
    done = fresh(code, path=(mine, ROOT))
    assert done.stdout == "True\n", done.stderr
    assert "skipped" not in done.stderr


# README: | `pyramidkv` | `SnapKVCache(allocation="pyramid")` | as `snapkv`, more of it in early layers |
# README: | `adakv` | `SnapKVCache(allocation="heads")` | as `snapkv`; the heads of a layer compete for its budget |
@pytest.mark.parametrize(("name", "allocation"), [("pyramidkv", "pyramid"), ("AdaKV", "heads")])
def test_papers_that_share_a_budget_in_another_way_have_names(name, allocation):
    cache = registry.build(f"{name}:window=4:kernel=3", tiny(), 40)
    assert isinstance(cache.policy, SnapKV)
    assert (cache.policy.window, cache.allocation) == (4, allocation)
    assert registry.canonical(name) == f"snapkv:allocation={allocation}"
    with pytest.raises(ValueError, match="allocation must be given once"):
        registry.parse(f"{name}:allocation=uniform")


# README: | `criticalkv` | `SnapKVCache(second_stage=0.5)` | as `snapkv`; half of the budget by what a token changes |
def test_a_second_stage_has_a_name():
    cache = registry.build("CriticalKV:window=4:allocation=heads", tiny(), 40)
    assert isinstance(cache.policy, SnapKV)
    assert (cache.policy.window, cache.policy.second_stage, cache.allocation) == (4, 0.5, "heads")
    assert registry.canonical("criticalkv") == "snapkv:second_stage=0.5"

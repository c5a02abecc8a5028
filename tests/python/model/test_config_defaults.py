# What a configuration means that leaves an option out: earlier programs depend on it.
import peft
import pytest

import rankwise as rw
from rankwise.config import AdapterOptions

SHARED = dict(
    exclude_modules=None, rank_pattern={}, alpha_pattern={}, modules_to_save=(), dropout=0.0,
    adapter_dtype=None,
)  # fmt: skip


def options(config) -> dict:
    return {name: value for name, value in vars(config).items() if name != "target_modules"}


def test_lora():
    adapter = dict(rank=8, alpha=16.0, rslora=False, init=None)
    assert options(rw.LoRAConfig(target_modules=["a"])) == SHARED | adapter


def test_adalora_is_as_in_peft():
    config = options(rw.AdaLoRAConfig(target_modules=["a"], total_steps=10))
    theirs = peft.AdaLoraConfig(target_modules=["a"], total_step=10)
    names = dict(
        initial_rank="init_r", target_rank="target_r", total_steps="total_step",
        warmup_steps="tinit", final_steps="tfinal", allocation_interval="deltaT", beta1="beta1",
        beta2="beta2", dropout="lora_dropout",
    )  # fmt: skip
    assert {ours: config.pop(ours) for ours in names} == {
        ours: getattr(theirs, name) for ours, name in names.items()
    }
    rest = dict(alpha=24.0, budget_unit="triplets", min_rank=0, shrink=True)
    assert config == {name: SHARED[name] for name in SHARED if name != "dropout"} | rest


def test_spectral():
    schedule = dict(
        total_steps=10, warmup_steps=0, final_steps=0, allocation_interval=100, initial_budget=0,
        final_budget=0, budget_at=None,
    )  # fmt: skip
    scores = dict(score="normalised", sensitivity_weight=0.1, beta=0.85, threshold=0.0)
    choices = dict(
        hysteresis=0.5, max_moves=None, growth="least", kth_least=1, probes=0, min_age=None,
        ramp_steps=0, seed=0, rule=None,
    )  # fmt: skip
    ranks = dict(initial_rank=8, alpha=16.0, max_rank=None, min_rank=1)
    config = rw.SpectralConfig(target_modules=["a"], total_steps=10)
    assert options(config) == SHARED | ranks | schedule | scores | choices


def test_a_layer():
    layer = rw.nn.LoRALinear(4, 3).options
    assert (layer.rank, layer.alpha, layer.dropout, layer.rslora) == (8, 16.0, 0.0, False)


@pytest.mark.parametrize("rslora, alpha", [(False, 2.0), (True, 8**0.5)])
def test_options_within_a_smaller_side(rslora, alpha):
    """The capacity falls first, and the scaling stays."""
    options = AdapterOptions(rank=2, capacity=8, alpha=4.0, rslora=rslora)
    assert options.within(8) is options
    for side, rank, wanted in ((7, 2, 4.0), (2, 2, 4.0), (1, 1, alpha)):
        within = options.within(side)
        assert (within.rank, within.capacity) == (rank, side)
        assert within.alpha == pytest.approx(wanted)
        assert within.scaling == pytest.approx(options.scaling)
    assert AdapterOptions(rank=2, alpha=4.0).within(1).capacity == 1

"""runs/scale.py: the paper's shapes priced as by hand."""

import pytest

from cost import count_params
from runs import scale
from runs.scale import ScaleConfig, gpu_hours, network, rows_that_fit, share, step_flops


def test_the_networks_are_the_papers():
    """281.5M, 570.4M and 1,681.9M with a tied embedding of 256,000 rows (the paper: 280M, "270M", 1.7B), and norms."""
    for size, millions in {"Base": 281.5, "Large": 570.4, "XL": 1681.9, "7B": 6738.4, "13B": 13015.9}.items():
        assert count_params(network(size)) / 1e6 == pytest.approx(millions, abs=0.2)


def test_an_ar_step_of_base_is_counted_as_by_hand():
    """A block: 4 x 768² for attention's products, 3 x 768 x 2048 for the MLP, 2 x 1024 x 768 for scores and values."""
    block = 4 * 768**2 + 3 * 768 * 2048 + 2 * 1024 * 768
    row = 2 * (12 * 1024 * block + 512 * 256_000 * 768)  # a multiply-add counts 2
    assert step_flops("Base", "ar") == 128 * 3 * row == 158_948_149_690_368
    assert step_flops("Base", "diffusion") == 2 * 128 * 3 * row  # two terms


def test_a_million_ar_steps_of_base_take_112_hours_of_an_h100_at_40_percent():
    """1.59e14 FLOPs x 1e6 / (989e12 x 0.4 x 3600)."""
    assert gpu_hours(ScaleConfig(), 1e6 * step_flops("Base", "ar")) == pytest.approx(111.6, abs=0.05)
    assert gpu_hours(ScaleConfig(mfu=0.2), 3.6e15) == pytest.approx(1 / 197.8)


def test_muon_of_a_square_and_a_wide_matrix():
    """Five iterations of X Xᵀ and the last product (a²b each, 2 FLOPs an entry) and the square of a x a; width 4: qkv
    of 12, the projection of 4, gate and up in one of 16, down of 8."""
    sizes = dict(vocab_size=5, n_ordinary=2, pad_id=2, sep_id=3, mask_id=4, n_layer=1, n_head=1, n_embd=4, n_hidden=8)
    one = scale.ModelConfig(**sizes, block_size=8)
    assert scale.muon_flops(one) == sum(5 * (4 * 4 * 4 * b + 2 * 4**3) for b in (12, 4, 16, 8))


def test_shares_and_rows():
    """XL: 18 bytes for each of 1.682 billion. 13B: on one GPU of 80 GB not one row; in 64 shares 16 / 64 + 2 bytes."""
    assert share("XL", 1, False) == pytest.approx(1.6819 * 18, rel=1e-3)
    assert share("13B", 64, True) == pytest.approx(13.016 * 2.25, rel=1e-3)
    assert rows_that_fit(ScaleConfig(), "13B", 1) == 0 and rows_that_fit(ScaleConfig(memory_gb=1e4), "Base", 1) == 128


@pytest.mark.parametrize("settings", [{"mfu": 0.0}, {"mfu": 1.5}, {"link_gb": 0.0}])
def test_assumptions_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="mfu must be in"):
        ScaleConfig(**settings)


def test_the_command_prints_every_table(capsys):
    scale.main(["--mfu=0.3"])
    said = capsys.readouterr().out
    assert all(f"### {name}" in said for name in scale.TABLES) and "at 30% of 989 TFLOP/s" in said

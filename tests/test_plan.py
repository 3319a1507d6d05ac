"""`fastclip plan`: its counts against what torch does, its arithmetic against the losses' own messages, its output."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastclip.cli import main
from fastclip.clip import Clip, model_config
from fastclip.clip.config import (
    CausalTextConfig,
    CbowConfig,
    ClipConfig,
    ConvConfig,
    ResNetConfig,
    TextConfig,
    VitConfig,
)
from fastclip.plan import rates as measured
from fastclip.plan.memory import largest_micro_batch, memory
from fastclip.plan.rates import Rates, times
from fastclip.plan.setting import Setting
from fastclip.plan.towers import TOWERS, tower_cost
from fastclip.plan.work import work

# One of each kind, as small as it can be with every part in it; widths differ so that none can stand for another.
CONFIGS = {
    "vit": VitConfig(image_size=16, patch_size=4, width=48, layers=3, head_width=16),
    "vit-mlp": VitConfig(
        image_size=16, patch_size=8, width=48, layers=2, head_width=16, mlp_ratio=3.0, quick_gelu=True
    ),
    "resnet": ResNetConfig(image_size=64, width=8, layers=(1, 2, 1, 1), head_width=32),
    "conv": ConvConfig(image_size=16, channels=1, widths=(8, 12), blocks=(0, 1), hidden=40),
    "conv-rgb": ConvConfig(image_size=15, channels=3, widths=(8, 12), blocks=(1, 0), hidden=40),
    "causal": CausalTextConfig(vocabulary=90, context=14, width=48, layers=3, head_width=16),
    "mean": TextConfig(vocabulary=90, context=14, width=48, layers=2, head_width=16),
    "bag": CbowConfig(vocabulary=90, context=14, width=48),
}
EMBED_DIM = 24
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def tower_and_input(config, rows: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if isinstance(config, (VitConfig, ResNetConfig, ConvConfig)):
        model = Clip(ClipConfig(EMBED_DIM, config, CONFIGS["bag"])).image
        return model, torch.randn(rows, config.channels, config.image_size, config.image_size)
    ids = torch.randint(1, config.vocabulary - 1, (rows, config.context))
    ids[:, -1] = config.vocabulary - 1  # the end token: captions fill the context
    return Clip(ClipConfig(EMBED_DIM, CONFIGS["conv"], config)).text, ids


def test_every_kind_of_tower_is_counted():
    from fastclip.clip.model import TOWERS as BUILT

    assert set(TOWERS) == set(BUILT) == {type(config) for config in CONFIGS.values()}


@each_config
def test_flops_are_those_of_torch_s_counter(config):
    rows = 3
    model, inputs = tower_and_input(config, rows)
    # torch's counter knows the attention's products, and not its fused kernels on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs)
    assert counter.get_total_flops() == rows * tower_cost(config, EMBED_DIM, 4, False).flops


def kept(model: nn.Module, inputs: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps, without the weights, their 16-bit copies and the batch."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers(), inputs]}
    sizes = {p.numel() for p in model.parameters()}
    found, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        rounded = tensor.dtype == torch.bfloat16 and tensor.numel() in sizes and tensor.shape[0] != len(inputs)
        if storage.data_ptr() not in weights and not rounded:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive.append(model(inputs))
    return sum(found.values())


def kept_per_row(config, recompute: bool = False) -> float:
    counts = []
    for rows in (7, 20):  # no product of sizes that is also a weight's
        model, inputs = tower_and_input(config, rows)
        model.set_grad_checkpointing(recompute)
        counts.append(kept(model, inputs))
    return (counts[1] - counts[0]) / 13


@each_config
def test_kept_bytes_are_what_autograd_saves(config):
    planned = tower_cost(config, EMBED_DIM, 4, False).kept
    assert kept_per_row(config) == pytest.approx(planned, rel=0.03)


@each_config
def test_kept_bytes_under_autocast(config, monkeypatch):
    """As on a GPU, where autocast normalises in float32; on a CPU it does not, so here it is made to."""
    layer_norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *rest: layer_norm(x.float(), *rest))
    with torch.autocast("cpu", torch.bfloat16):
        found = kept_per_row(config)
    assert found == pytest.approx(tower_cost(config, EMBED_DIM, 2, False).kept, rel=0.03)


@each_config
def test_recomputation_keeps_the_inputs_of_blocks(config):
    assert kept_per_row(config, recompute=True) == pytest.approx(tower_cost(config, EMBED_DIM, 4, True).kept, rel=0.05)


SMALL = Setting(ClipConfig(EMBED_DIM, CONFIGS["vit"], CONFIGS["causal"]), batch=4096, gpus=4, dtype="fp32")


class TestMemory:
    def test_weights_and_optimizer_are_those_of_the_model(self):
        model = Clip(SMALL.model)
        towers = sum(p.numel() for p in [*model.image.parameters(), *model.text.parameters()])
        found = memory(SMALL)
        assert (found.weights, found.gradients, found.optimizer) == (4 * towers, 4 * towers, 8 * towers)

    def test_caching_holds_a_micro_batch_of_one_tower(self):
        whole, cached = memory(SMALL), memory(replace(SMALL, micro_batch=64))
        image, text = SMALL.towers
        assert whole.activations == 1024 * (image.kept + text.kept)
        assert cached.activations == 64 * max(image.kept, text.kept)
        assert whole.peak == whole.fixed + whole.activations + whole.loss
        assert cached.peak == cached.fixed + max(cached.activations, cached.loss)
        assert memory(replace(SMALL, micro_batch=9999)).activations == 1024 * max(image.kept, text.kept)

    def test_one_block_of_one_tower_is_recomputed_at_a_time(self):
        again = replace(SMALL, recompute=True)
        image, text = again.towers
        assert 0 < image.recomputed < SMALL.towers[0].kept - image.kept
        assert memory(again).activations == 1024 * (image.kept + text.kept + max(image.recomputed, text.recomputed))
        cached = memory(replace(again, micro_batch=64))
        assert cached.activations == 64 * max(image.kept + image.recomputed, text.kept + text.recomputed)

    def test_sixteen_bits_add_rounded_weights_and_halve_the_features(self):
        half = memory(replace(SMALL, dtype="bf16"))
        assert half.rounded_weights == 2 * sum(SMALL.parameters)
        assert half.features == memory(SMALL).features / 2

    def test_shards_divide_what_the_optimizer_holds(self):
        sharded = memory(replace(SMALL, parallel="fsdp"))
        assert sharded.optimizer == memory(SMALL).optimizer / 4
        assert sharded.weights == memory(SMALL).weights / 4 + 4 * max(SMALL.parameters)

    def test_a_ring_does_not_hold_all_keys(self):
        many = replace(SMALL, batch=2**20, gpus=64)
        gather, ring = memory(many).loss, memory(replace(many, loss_mode="ring")).loss
        assert ring - 512 * 2**20 < (gather - 512 * 2**20) / 10

    def test_the_loss_grows_with_n(self):
        large, larger = (replace(SMALL, batch=n, gpus=1, dtype="bf16") for n in (2**20, 2**21))
        assert memory(larger).loss - 512 * 2**20 == 2 * (memory(large).loss - 512 * 2**20)

    def test_the_largest_micro_batch_fits_and_twice_as_much_does_not(self):
        setting = replace(SMALL, batch=2**17, gpus=1)
        available = memory(replace(setting, micro_batch=30_000)).peak / 0.9
        assert largest_micro_batch(setting, available) == 16384
        assert largest_micro_batch(replace(setting, batch=100), 1e15) == 128
        assert largest_micro_batch(setting, 1.0) == 1


class TestWork:
    def test_flops(self):
        forward = 1024 * sum(tower.flops for tower in SMALL.towers)
        assert work(SMALL).towers == 3 * forward and work(SMALL).again == 0
        both = work(replace(SMALL, micro_batch=64, recompute=True))
        assert both.again == 2 * forward
        assert both.loss == 8 * 1024 * 4096 * EMBED_DIM

    def test_messages(self):
        """Keys and their gradients, and 16 bytes a column; the gradients' all-reduce sends each number twice."""
        found, others = work(SMALL), 4096 * 3 / 4
        assert found.loss_bytes == 2 * 4 * others * EMBED_DIM + 16 * others
        assert found.weight_bytes == 2 * 3 / 4 * 4 * sum(SMALL.parameters)
        assert work(replace(SMALL, loss_mode="ring")).loss_bytes == 3 * 4 * others * EMBED_DIM + 16 * others
        sharded = work(replace(SMALL, parallel="fsdp", micro_batch=512))  # 2 micro-batches, 3 gathers each
        assert sharded.weight_bytes == (1 + 6) * 3 / 4 * 4 * sum(SMALL.parameters)

    def test_one_process_sends_nothing(self):
        assert work(replace(SMALL, gpus=1)).bytes_sent == 0
        assert work(replace(SMALL, gpus=1, parallel="fsdp")).bytes_sent == 0


class TestTimes:
    def test_amount_over_rate(self):
        setting = replace(SMALL, micro_batch=64)
        found = times(work(setting), Rates(towers=1e9, forward=2e9, loss=4e9, network=1e6))
        w = work(setting)
        assert found.step == pytest.approx(w.towers / 1e9 + w.again / 2e9 + w.loss / 4e9 + w.bytes_sent / 1e6)

    def test_a_missing_rate_leaves_a_blank_and_no_sum(self):
        found = times(work(SMALL), Rates(loss=1e9))
        assert found.towers is None and found.loss > 0 and found.again == 0 and found.step is None


class TestRatesFile:
    def test_what_is_saved_is_read(self, tmp_path):
        path, rates = tmp_path / "rates.json", Rates(1e9, 2e9, 3e9, None, "measured here")
        measured.save(path, rates, "fp32")
        assert measured.read(path, "fp32") == rates

    def test_the_loss_s_rate_from_a_results_file(self, tmp_path):
        row = {"case": "clip", "mode": "forward+backward", "dtype": "fp32", "label": "fastclip cpu", "d": 512}
        row |= {"n": 4096, "status": "measured", "seconds": {"median": 0.5}}
        other = row | {"label": "dense", "n": 8192}
        path = tmp_path / "results.json"
        path.write_text(json.dumps({"rows": [row, other], "machine": {"cpu": "a processor"}, "extra": {}}))
        found = measured.read(path, "fp32")
        assert found.loss == 8 * 4096**2 * 512 / 0.5 and found.towers is None
        assert "N = 4,096" in found.source and "a processor" in found.source

    @pytest.mark.parametrize("content", ["no JSON", "[]", '{"rows": []}'])
    def test_files_without_rates(self, tmp_path, content, capsys):
        path = tmp_path / "file.json"
        path.write_text(content)
        with pytest.raises(SystemExit) as end:
            main(["plan", "--rates", str(path)])
        assert end.value.code == 1 and str(path) in capsys.readouterr().err


class TestCommand:
    def test_what_it_prints(self, capsys):
        command = "plan --gpus 64 --batch 1048576 --dim 1024 --model ViT-L/14 --gpu h200 --dtype bf16"
        main(command.split())
        told = capsys.readouterr().out
        assert "ViT-L/14, embeddings of 1024" in told and "16,384 each; bf16" in told
        assert "does not fit" in told and "cached, 256, recomputed" in told
        # Nothing was measured: no time but the datasheet's bound, which is named as one.
        blank = next(line for line in told.splitlines() if line.strip().startswith("step"))
        assert blank.split() == ["step"]
        assert "no rate was measured" in told and "datasheet's peak of 989 TFLOP/s" in told

    def test_times_from_a_file(self, capsys, tmp_path):
        path = tmp_path / "rates.json"
        measured.save(path, Rates(1e12, 1e12, 1e12, None, "measured on a machine"), "bf16")
        main(["plan", "--batch", "4096", "--rates", str(path)])
        told = capsys.readouterr().out
        assert "Rates: measured on a machine." in told
        step = next(line for line in told.splitlines() if line.strip().startswith("step")).split()
        assert len(step) == 5 and all(float(value) > 0 for value in step[1:])

    def test_a_network_as_given(self, capsys):
        main(["plan", "--gpus", "2", "--network", "50"])
        told = capsys.readouterr().out
        assert "network as given" in told
        assert len(next(line for line in told.splitlines() if line.strip().startswith("messages")).split()) == 5

    def test_measured_here(self, capsys, tmp_path, monkeypatch):
        """With a probe of a few rows; every time is then a number."""
        from fastclip.plan import measure

        monkeypatch.setattr(measure, "TOWER_FLOPS", {"cpu": 1e8})
        monkeypatch.setattr(measure, "LOSS_ROWS", {"cpu": 64})
        path = tmp_path / "rates.json"
        main(f"plan --model glyph-conv --dtype fp32 --batch 512 --measure --save-rates {path}".split())
        told = capsys.readouterr().out
        assert "measured here" in told and "no rate" not in told
        assert all(math.isfinite(rate) and rate > 0 for rate in (measured.read(path, "fp32").towers,))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--model nobody", "no model named 'nobody'"),
            ("--gpus 0", "--gpus must be at least 1"),
            ("--gpus 8 --batch 4", "--batch must be at least 8"),
            ("--micro-batch 0", "--micro-batch must be at least 1"),
            ("--gpu abacus", "--gpu takes b200"),
            ("--network -1", "--network must be positive"),
            ("--save-rates x.json", "give both"),
            ("--rates x.json --measure", "exclude each other"),
            ("--rates nowhere.json", "nowhere.json"),
        ],
    )
    def test_mistakes(self, capsys, flags, message):
        with pytest.raises(SystemExit) as end:
            main(["plan", *flags.split()])
        assert end.value.code == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "published"), [("ViT-B/32", 4.409e9), ("ViT-B/16", 17.564e9)], ids=["ViT-B/32", "ViT-B/16"]
)
def test_vision_transformers_cost_what_is_published(name, published):
    """Multiply-adds, torchvision's vit_b_32 and vit_b_16. CLIP's last of 12 blocks works on one token, not on all."""
    config = model_config(name)
    assert 11 / 12 < tower_cost(config.image, config.embed_dim, 4, False).flops / 2 / published < 1

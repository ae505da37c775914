"""The choice of a device by what a machine has, and what a device without float64 computes."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grr.data import Batch
from grr.data.collate import collate_captions
from grr.evaluation.classification import classification_step
from grr.evaluation.probe import linear_probe
from grr.evaluation.retrieval import retrieval
from grr.inference.pretrained import load_pretrained
from grr.models.builders import grr_coca_tiny
from grr.models.heads import image_classifier
from grr.parallel import device as devices
from grr.parallel.compiled import compiles
from grr.parallel.device import check_device, choose_device, device_name, exact_dtype, where_float64_is
from grr.parallel.float8 import multiply_in_float8
from grr.parallel.parallelize import parallelize
from grr.training.micro_batch import USABLE
from grr.training.optim import adamw, clip_gradients
from grr.training.step import global_batch_step

pytestmark = pytest.mark.usefixtures("process_group")

MPS = torch.device("mps")


@pytest.mark.parametrize(
    ("cuda", "mps", "processes", "expected"),
    [
        (True, False, 4, "cuda:3"),
        (True, True, 1, "cuda:3"),
        (False, True, 1, "mps"),
        (False, True, 2, "cpu"),  # gloo does not reduce tensors of mps
        (False, False, 1, "cpu"),
    ],
)
def test_a_process_computes_on_the_first_device_that_is_there(cuda, mps, processes, expected):
    assert choose_device(cuda=cuda, mps=mps, processes=processes, local_rank=3) == torch.device(expected)


def test_a_device_that_is_wanted_is_taken_or_refused_with_those_that_are_there():
    for cuda, mps, wanted in itertools.product((True, False), (True, False), ("cpu", "mps", "cuda")):
        has = {"cpu": True, "mps": mps, "cuda": cuda}
        if has[wanted]:
            device = choose_device(cuda=cuda, mps=mps, processes=1, local_rank=0, wanted=wanted)
            assert device.type == wanted
        else:
            found = ", ".join(kind for kind in ("cuda", "mps", "cpu") if has[kind])
            with pytest.raises(ValueError, match=rf"got '{wanted}', where {found} can be used; unset it"):
                choose_device(cuda=cuda, mps=mps, processes=1, local_rank=0, wanted=wanted)
    with pytest.raises(ValueError, match="got 'mps', where cpu can be used"):
        choose_device(cuda=False, mps=True, processes=2, local_rank=0, wanted="mps")
    with pytest.raises(ValueError, match="must be one of cpu, mps, cuda that this process can use, got 'gpu'"):
        choose_device(cuda=True, mps=True, processes=1, local_rank=0, wanted="gpu")


def test_the_environment_chooses_the_device(monkeypatch):
    monkeypatch.setenv("GRR_DEVICE", "cpu")
    assert devices.default_device() == torch.device("cpu")
    monkeypatch.setenv("GRR_DEVICE", "tpu")
    with pytest.raises(ValueError, match="GRR_DEVICE must be one of cpu, mps, cuda"):
        devices.default_device()


def test_a_gpu_that_is_not_there_is_refused():
    assert check_device("cuda:1", gpus=2, mps=False) == torch.device("cuda:1")
    assert check_device("mps", gpus=0, mps=True) == MPS
    with pytest.raises(ValueError, match="got 'cuda:2' and 2 CUDA GPUs are available; leave device out"):
        check_device("cuda:2", gpus=2, mps=False)
    with pytest.raises(ValueError, match="got 'mps' and MPS is not available; leave device out"):
        check_device("mps", gpus=1, mps=False)


def test_what_mps_lacks_is_refused_by_name_or_has_a_default(monkeypatch):
    assert device_name(MPS) == "MPS"
    assert exact_dtype(MPS) == torch.float32
    assert exact_dtype(torch.device("cuda")) == exact_dtype(torch.device("cpu")) == torch.float64
    assert not compiles(MPS, None)
    assert set(USABLE) == set(devices.CHOICES)
    with pytest.raises(ValueError, match=r"needs a CUDA GPU .* got mps; set parallel.float8=false"):
        multiply_in_float8(grr_coca_tiny(), MPS)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="a Mac's GPU computes in one process, got world=2 on mps"):
        parallelize(grr_coca_tiny(), MPS)


def test_a_quantised_model_on_mps_is_refused_before_its_weights_are_read(colour_run, monkeypatch):
    from grr.inference.pretrained import find_pretrained

    source = find_pretrained(colour_run)._replace(quantization="int8_weight_only")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match="a quantised model computes on a CPU or a CUDA GPU, got mps; give device='cpu'"
    ):
        load_pretrained(source, device="mps")


class NoFloat64(TorchDispatchMode):
    """Raises where an operation returns a float64 tensor, as a device without them would."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            assert not (isinstance(x, Tensor) and x.dtype == torch.float64), f"{function} returns float64"
        return result


def batches(pieces: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    rows = [[510, *range(3, 5 + k), 1, *[0] * (11 - k), 511, 0] for k in range(8)]
    size = 8 // pieces
    cuts = [slice(i * size, (i + 1) * size) for i in range(pieces)]
    classes = torch.arange(8) % 3
    return [Batch(images[c], *collate_captions(rows[c]), [""] * size, 0, classes[c]) for c in cuts]


def contrastive_step(model: torch.nn.Module, pieces: int, **options: str) -> Callable[[], object]:
    return lambda: global_batch_step(model, batches(pieces), 0, **options)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("negatives", ["global", "local"])
def test_a_training_step_without_float64_has_the_gradients_of_one_with_it(monkeypatch, pieces, negatives):
    """The CPU is treated as a device without float64; both kinds of step differ by rounding only."""
    torch.manual_seed(0)
    model = grr_coca_tiny()
    optimizer = adamw(model, lr=1e-3)

    def gradients(step: Callable[[], object]) -> list[Tensor]:
        step()
        norm = clip_gradients(model, 1.0)
        found = [norm, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.zero_grad(set_to_none=True)
        return found

    step = contrastive_step(model, pieces, negatives=negatives)
    exact = gradients(step)
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", ("mps", "cpu"))
    with NoFloat64():
        rounded = gradients(step)
        step()
        optimizer.step()
    torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-8)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="returns float64"), NoFloat64():
        gradients(step)


def test_a_classification_step_and_a_probability_need_no_float64_on_their_device(monkeypatch):
    torch.manual_seed(0)
    model = image_classifier(grr_coca_tiny(), 3)
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", ("mps", "cpu"))
    with NoFloat64():
        classification_step(model, batches(2), 0)
        clip_gradients(model, 1.0)


def test_metrics_in_float64_are_computed_on_the_cpu_if_their_device_has_none():
    """Meta tensors stand for a device: what lies there reaches the CPU only if it is moved."""
    x = torch.randn(4, 3)
    assert where_float64_is(x) is x
    moved = []

    class OnMps(Tensor):
        device = MPS

        def cpu(self) -> Tensor:
            moved.append(self)
            return self.as_subclass(Tensor)

    images, texts = x.as_subclass(OnMps), x.clone().as_subclass(OnMps)
    assert retrieval(images, texts, torch.arange(4))["image_to_text_r1"] == 1
    assert len(moved) == 2
    labels = torch.tensor([0, 1, 0, 1]).as_subclass(OnMps)
    linear_probe(images, labels, texts, labels, 2, strengths=(0.1,))
    assert len(moved) == 6

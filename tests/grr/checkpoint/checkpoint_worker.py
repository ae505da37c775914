"""What test_checkpoint.py runs in other processes: torchrun checkpoint_worker.py RUN, or python ... kill FOLDER."""

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from grr.checkpoint.model_folder import load_model_weights, save_model
from grr.checkpoint.run_lock import RunLock
from grr.checkpoint.step_folders import latest_checkpoint
from grr.checkpoint.stop_signal import StopSignal
from grr.checkpoint.training_state import load_checkpoint, save_checkpoint


class Toy(nn.Module):
    """Widths that no number of ranks divides, a parameter of one value, one that is never used, and a buffer."""

    def __init__(self, seed: int, *, dim: int = 7) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(5, dim), nn.GELU(), nn.Linear(dim, 3))
            self.scale = nn.Parameter(torch.rand(1))
            self.unused = nn.Parameter(torch.rand(2))
            self.register_buffer("count", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) * self.scale  # [b, 3]
        return out


def toy(seed: int, *, sharded: bool) -> tuple[Toy, Optimizer]:
    model = Toy(seed)
    if sharded:
        fully_shard(model.body)
        fully_shard(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return model, AdamW(groups, lr=0.01 * (seed + 1), betas=(0.8, 0.99), fused=True)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    """The losses of these steps; the batch of 8 is a function of the step, and each rank takes its part of it."""
    losses = []
    for step in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        if dist.is_initialized():
            x = x.chunk(dist.get_world_size())[dist.get_rank()]
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total.item())
    return losses


def whole(value: Any) -> Any:
    """Every tensor full, on every rank, so that states of different sharding can be compared."""
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [whole(entry) for entry in value]
    return value.full_tensor().tolist() if isinstance(value, DTensor) else getattr(value, "tolist", lambda: value)()


def state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Everything a checkpoint has to bring back, as plain lists (a list of floats loses no bit of a float32)."""
    names = [name for group in optimizer.param_groups for p in group["params"] for name in names_of(model, p)]
    values = optimizer.state_dict()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in values["param_groups"]]
    states = {names[i]: values["state"][i] for i in sorted(values["state"])}
    return {"model": whole(model.state_dict()), "state": whole(states), "groups": groups}


def names_of(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    return [name for name, p in model.named_parameters() if p is parameter]


def run(folder: Path) -> None:
    """The test of several ranks: the first launch trains and saves, any launch loads, checks and trains on."""
    dist.init_process_group("gloo")
    report: dict[str, Any] = {}

    if latest_checkpoint(folder) is None:
        model, optimizer = toy(0, sharded=True)
        report["first"] = train(model, optimizer, range(3))
        save_checkpoint(folder, model, optimizer, {"step": 3, "epoch": 0})
        report["saved"] = state(model, optimizer)
        report["continued"] = train(model, optimizer, range(3, 6))
        save_model(folder / "model", model, {"builder": "toy"}, None)
        report["final"] = get_full(model)

    model, optimizer = toy(1, sharded=True)
    path = latest_checkpoint(folder)
    assert path is not None
    report["progress"] = load_checkpoint(path, model, optimizer)
    report["loaded"] = state(model, optimizer)
    report["resumed"] = train(model, optimizer, range(3, 6))
    load_model_weights(folder / "model", model)
    report["weights"] = get_full(model)

    def refused(act: Any) -> str:
        try:
            act()
        except (OSError, ValueError) as error:
            return str(error)
        return "not refused"

    with RunLock(folder):
        report["lock"] = refused(lambda: RunLock(folder, patience=0.0))
    other = Toy(0, dim=9)
    fully_shard(other)
    report["misfit"] = refused(lambda: load_model_weights(folder / "model", other))

    stop = StopSignal()
    report["stop before"] = stop.requested()
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    report["stop after"] = stop.requested()

    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    if dist.get_rank() == 0:
        (folder / f"report_{dist.get_world_size()}.json").write_text(json.dumps(reports))


def get_full(model: nn.Module) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=True)
    return {name: whole(value) for name, value in get_model_state_dict(model, options=options).items()}


def constant(value: float) -> tuple[nn.Module, Optimizer]:
    """A model and optimizer in which every number is value, big enough that writing takes a while."""
    model = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)
    return model, optimizer


def kill(folder: Path) -> None:
    """For each line on stdin, start a process that saves without end and kill it at a random moment."""
    for line in sys.stdin:
        warm, say = os.pipe()
        child = os.fork()  # safe here: this process has not used torch's threads
        if child == 0:
            os.close(warm)
            save_checkpoint(folder.with_name("warm"), *constant(0.0), {"step": 0})  # the first save imports much
            os.write(say, b"!")
            latest = latest_checkpoint(folder)
            step = 0 if latest is None else int(latest.name.split("_")[1].split(".")[0])
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                step += 1
                for _ in range(2):  # the second save replaces the first
                    save_checkpoint(folder, *constant(float(step)), {"step": step}, keep=1)
            os._exit(1)  # nobody killed it
        os.close(say)  # so that a child that dies ends the read
        os.read(warm, 1)
        time.sleep(random.Random(line).uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(warm)
        print("killed", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]))
    else:
        run(Path(sys.argv[1]))
        gc.collect()  # a sharded model still alive keeps gloo's threads, which then now and then abort the exit
        dist.destroy_process_group()

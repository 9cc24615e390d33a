"""The one training loop: schedule, mixed precision, checks with the best state kept, deadline, resume."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ttmpd.method import check_fields
from ttmpd.models.run import forget_caches
from ttmpd.models.state import load_tensor_state, tensor_state
from ttmpd.progress import tell
from ttmpd.storage import replacing

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Outcome of a training run.

    Args:
        steps: optimizer steps that were done.
        stopped: why it ended: "finished", "time budget", "no progress"; "nothing removed" where it did not begin.
        rolled_back: true if the start was better and was restored.
        best_step: the step whose weights were kept; 0 is the start.
        losses: mean training loss between evaluations.
        checks: (step, agreement share, held-out loss) at every evaluation.
        start_weight: weight of the initial parameters in the WiSE-FT average that was kept; 0 where none was made.
    """

    steps: int
    stopped: str
    rolled_back: bool
    best_step: int
    losses: tuple[float, ...] = ()
    checks: tuple[tuple[int, float, float], ...] = ()
    start_weight: float = 0.0


MIN_LOSS_GAIN = 0.25
"""Minimum relative gain in held-out loss for an earlier state to be preferred to the end of training (not tuned).

Of a few dozen samples, two or three make up most of the loss.
"""


@dataclass(frozen=True, slots=True)
class Check:
    """The student on held-out samples: agreement with the teacher (a share), and the loss that breaks ties."""

    agreement: float
    loss: float
    n_samples: int = 1

    def better_than(self, other: "Check", by: float = 0.0) -> bool:
        """True for agreement higher by two standard errors, or for equal agreement and a loss lower by a share ``by``.

        A loss that is not finite is never better.

        A few dozen held-out samples cannot tell agreements apart that lie closer, and the luckiest of ten checks is
        not the best student; the loss tells them apart.
        """
        if not (math.isfinite(self.loss) and math.isfinite(other.loss)):
            return math.isfinite(self.loss)
        # Laplace's estimate: the noise is not zero where all samples happen to agree.
        share = (other.agreement * self.n_samples + 1) / (self.n_samples + 2)
        if abs(self.agreement - other.agreement) > 2 * math.sqrt(share * (1 - share) / self.n_samples):
            return self.agreement > other.agreement
        return self.loss < other.loss * (1 - by)

    def diverged(self, best: "Check") -> bool:
        """True where training has diverged: a loss of twice the best so far or more, and no more agreement."""
        return not self.loss <= 2 * best.loss and self.agreement <= best.agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Optimizer and learning rate over the steps.

    Args:
        steps: optimizer steps.
        lr: peak learning rate.
        optimizer: "sgd" (momentum 0.9), "nesterov" (the same, looking ahead) or "adamw".
        weight_decay: on every trained parameter.
        shape: "one_cycle" (linear warm-up over the first fifth, cosine to zero) or "thirds" (x0.1 every 40 %: MiR).
        clip: largest gradient norm; 0 leaves gradients as they are.
    """

    steps: int
    lr: float
    optimizer: Literal["sgd", "nesterov", "adamw"] = "sgd"
    weight_decay: float = 1e-4
    shape: Literal["one_cycle", "thirds"] = "one_cycle"
    clip: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, steps=0, lr=0.0)

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if self.shape == "thirds":
            return self.lr * 0.1 ** int(step / max(1, self.steps) / 0.4)
        warm = max(1, self.steps // 5)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over ``parameters``."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        ahead = self.optimizer == "nesterov"
        return torch.optim.SGD(parameters, self.lr, 0.9, weight_decay=self.weight_decay, nesterov=ahead)


def batch_order(n_samples: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Positions of the samples of one step: epochs of seeded permutations, the last partial batch left out.

    A function of its arguments alone, so a resumed run goes on exactly where it was.
    """
    size = min(batch_size, n_samples)
    per_epoch = max(1, n_samples // size)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(n_samples, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return order[place * size : (place + 1) * size]


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """bfloat16 autocast on ``device``, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def choose_amp(step: Callable[[bool], object], device: torch.device, amp: str = "auto") -> bool:
    """True where bfloat16 autocast makes a step faster *here*: measured, since many processors emulate it slowly.

    Args:
        step: runs one training step with or without autocast.
        device: where it runs.
        amp: "on", "off", or "auto" to measure.
    """
    if amp != "auto":
        return amp == "on"
    if device.type == "cpu" and not _native_bfloat16():
        return False
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(3):
        for enabled in (True, False):
            start = time.perf_counter()
            step(enabled)
            if number:  # the first round warms up
                seconds[enabled].append(time.perf_counter() - start)
    return min(seconds[True]) < 0.9 * min(seconds[False])


def _native_bfloat16() -> bool:
    """True on processors with bfloat16 instructions; without them a step is ten times slower: no need to measure."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


@dataclass(frozen=True, eq=False, kw_only=True)
class Loop:
    """Checks, deadline and resume state of the training loop.

    Args:
        check: measures the student on held-out samples; None trains to the end and keeps the last state.
        check_every: steps between checks.
        patience: checks without progress after which training stops; 0 never stops early.
        deadline: ``time.monotonic()`` value at which training ends with the best state so far.
        state: file in which the run is kept every ``save_seconds``, so that it can go on after a kill.
        save_seconds: between two writes of ``state``.
        stage: name for the progress display.
    """

    check: Callable[[], Check] | None = None
    check_every: int = 20
    patience: int = 0
    deadline: float = math.inf
    state: Path | None = None
    save_seconds: float = 5.0
    stage: str = "distill"
    clock: Clock = time.monotonic


def train(model: nn.Module, loss_at: Callable[[int], Tensor], schedule: Schedule, loop: Loop) -> TrainingResult:
    """Train the parameters of ``model`` that require gradients, in place, and leave it with its best state.

    Args:
        model: in train or eval mode, which stays.
        loss_at: the loss of step 0, 1, ...; it runs the model.
        schedule: optimizer and learning rate.
        loop: checks, deadline, resume.

    Returns:
        What was done. ``rolled_back`` is true where the start was restored: it was better than the end or, where
        training stopped early, than every later check.
    """
    run = _Run(model, schedule, loop)
    run.resume()
    saved = loop.clock()
    while run.step < schedule.steps and not run.stopped:
        run.make_step(loss_at)
        last = run.step == schedule.steps
        if loop.check is not None and (run.step % loop.check_every == 0 or last):
            run.evaluate()
        if loop.clock() > loop.deadline:
            run.stopped = "time budget"
        if loop.state is not None and loop.clock() - saved > loop.save_seconds:
            run.save(loop.state)
            saved = loop.clock()
        tell(loop.stage, run.step, schedule.steps)
    return run.finish()


class _Run:
    """State of one training run: everything that a resumed run needs."""

    def __init__(self, model: nn.Module, schedule: Schedule, loop: Loop) -> None:
        self.model, self.schedule, self.loop = model, schedule, loop
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self._fresh_optimizer()
        self.step, self.stopped, self.best_step, self.idle = 0, "", 0, 0
        self.losses: list[float] = []
        self.checks: list[tuple[int, float, float]] = []
        self.running: list[float] = []
        self.best: Check | None = None
        self.best_state: dict[str, Tensor] = {}
        self.lr_scale = 1.0

    def make_step(self, loss_at: Callable[[int], Tensor]) -> None:
        """One optimizer step; a step whose loss is not finite, or whose clipped gradient is not, is left out.

        Dropout draws by the number of the step: a resumed run goes on exactly, and the caller's random state stays.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.step)
            forget_caches(self.model)
            loss = loss_at(self.step)
        self.step += 1
        if self.optimizer is None or not bool(torch.isfinite(loss.detach())):
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(self.step - 1) * self.lr_scale
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.schedule.clip:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
            if not bool(torch.isfinite(norm)):
                return
        self.optimizer.step()
        self.running.append(float(loss.detach()))

    def evaluate(self) -> None:
        """Check the student, and keep its weights if they are the best so far."""
        assert self.loop.check is not None
        now = self.loop.check()
        self.checks.append((self.step, now.agreement, now.loss))
        if self.running:
            self.losses.append(sum(self.running) / len(self.running))
            self.running.clear()
        # Gains in loss must not add up to a loss of agreement: the start stays the measure.
        start = Check(self.checks[0][1], self.checks[0][2], now.n_samples)
        if self.best is None or (now.better_than(self.best) and not start.better_than(now)):
            self.best, self.best_step, self.idle = now, self.step, 0
            self.best_state = {name: value.detach().clone() for name, value in tensor_state(self.model).items()}
        else:
            self.idle += 1
            if now.diverged(self.best):
                self._back_off()
            if self.loop.patience and self.idle >= self.loop.patience:
                self.stopped = "no progress"

    def _back_off(self) -> None:
        """Go on from the best state at a third of the learning rate, without the old momentum."""
        load_tensor_state(self.model, self.best_state)
        self.optimizer = self._fresh_optimizer()
        self.lr_scale /= 3

    def _fresh_optimizer(self) -> torch.optim.Optimizer | None:
        """None where nothing can learn."""
        return self.schedule.build(self.parameters) if self.parameters else None

    def finish(self) -> TrainingResult:
        """Restore the best state and return what was done."""
        if self.loop.check is not None and self.checks[-1][0] != self.step:
            self.evaluate()
        if self._ended_well():
            self.best_step = self.step
        elif self.best_state:
            load_tensor_state(self.model, self.best_state)
        return TrainingResult(
            steps=self.step,
            stopped=self.stopped or "finished",
            rolled_back=self.loop.check is not None and self.best_step == 0 and self.step > 0,
            best_step=self.best_step if self.loop.check is not None else self.step,
            losses=tuple(self.losses),
            checks=tuple(self.checks),
        )

    def _ended_well(self) -> bool:
        """True where the last state is kept even if an earlier check was slightly better.

        Once the learning rate has fallen to zero the weights no longer move. The best of ten checks on the way was
        better by chance, unless by `MIN_LOSS_GAIN`. The same holds for the start: a closed form is fitted to the
        teacher's predictions themselves and comes nearer to them than training does, errors included.
        """
        if self.best is None or self.stopped or not self.step:
            return False
        start, last = (Check(*self.checks[i][1:], self.best.n_samples) for i in (0, -1))
        earlier = (self.best, start)
        return math.isfinite(last.loss) and not any(check.better_than(last, by=MIN_LOSS_GAIN) for check in earlier)

    def resume(self) -> None:
        """Continue from the saved state if there is one that fits; else evaluate the start."""
        if self.loop.state is not None and self.loop.state.exists() and self._load(self.loop.state):
            return
        if self.loop.check is not None:
            self.evaluate()

    def save(self, path: Path) -> None:
        """Write the state of the run, whole or not at all."""
        tensors = {f"model.{name}": value for name, value in tensor_state(self.model).items()}
        tensors |= {f"best.{name}": value for name, value in self.best_state.items()}
        tensors |= {f"optimizer.{i}.{key}": value for i, key, value in self._optimizer_tensors()}
        facts = {
            "step": self.step,
            "best_step": self.best_step,
            "idle": self.idle,
            "lr_scale": self.lr_scale,
            "losses": self.losses,
            "checks": self.checks,
            "best": None if self.best is None else dataclasses.astuple(self.best),
        }
        with replacing(path) as unfinished:
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, unfinished, {"facts": json.dumps(facts)})

    def _optimizer_tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        if self.optimizer is None:
            return
        for number, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    yield number, key, value

    def _load(self, path: Path) -> bool:
        from safetensors import safe_open

        try:
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
            device = next(self.model.parameters()).device
            model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
            load_tensor_state(self.model, model)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError):
            return False  # an unreadable state, or that of another run: start from the beginning
        self.best_state = {k.removeprefix("best."): v.to(device) for k, v in tensors.items() if k.startswith("best.")}
        for key, value in tensors.items():
            if key.startswith("optimizer.") and self.optimizer is not None:
                _, number, name = key.split(".", 2)
                parameter = self.parameters[int(number)]
                self.optimizer.state[parameter][name] = value if name == "step" else value.to(device)
        self.step, self.best_step, self.idle = facts["step"], facts["best_step"], facts["idle"]
        self.lr_scale = facts["lr_scale"]
        self.losses, self.checks = facts["losses"], [(s, a, b) for s, a, b in facts["checks"]]
        self.best = None if facts["best"] is None else Check(*facts["best"])
        return True

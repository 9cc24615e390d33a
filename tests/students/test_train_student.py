"""Students on a part of the labels: the loss by hand, what is kept, what the teacher is asked, resume."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ttmpd
from ttmpd.adapt.norm import Norm
from ttmpd.data.samples import Samples
from ttmpd.data.views import fixed_view
from ttmpd.errors import InvalidValueError, ModelError
from ttmpd.models.modules import clone
from ttmpd.quality.margins import DeepFoolConfig, margins, radii
from ttmpd.select.el2n import EL2N
from ttmpd.select.forgetting import Forgetting
from ttmpd.select.puma import PUMA
from ttmpd.students.adversarial import Attack
from ttmpd.students.recipe import Recipe, alpha_for
from ttmpd.students.train import WORK, distillation_loss, train_student
from ttmpd.students.training_set import quotas, steps_per_epoch
from ttmpd.testing.tiny_models import assert_untouched, tiny_model, tiny_samples
from ttmpd.training.loop import Schedule, batch_order

N = 40
LABELS = torch.arange(N) % 4
QUICK = {"fraction": 0.5, "steps": 6, "batch_size": 8, "views": 2, "lr": 0.01}


@pytest.fixture
def pool() -> Samples:
    return tiny_samples(N)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def counted(teacher: nn.Module) -> list[int]:
    """Filled with the size of every batch that the teacher answers."""
    sizes: list[int] = []
    teacher.register_forward_hook(lambda _m, args, _out: sizes.append(len(args[0])))
    return sizes


# --- the loss


LOOKED_AT = 3 * 2
"""Samples of three passes over two: a first one, one more to see that nothing is random, one in channels-last."""


def test_alpha_by_fraction():
    # 1 - f / 2, cut at both ends: 0.98 up to f = 0.04, and 0.5 at f = 1.
    found = {f: alpha_for(f) for f in (0.0, 0.01, 0.04, 0.1, 0.3, 0.5, 1.0)}
    assert found == pytest.approx({0.0: 0.98, 0.01: 0.98, 0.04: 0.98, 0.1: 0.95, 0.3: 0.85, 0.5: 0.75, 1.0: 0.5})
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidValueError, match="fraction"):
            alpha_for(wrong)


def test_the_loss_by_hand():
    logits, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    label = torch.tensor([0])
    ce = torch.log1p(torch.exp(torch.tensor(-2.0)))
    # At temperature 4 the logits are (0.5, 0) and (0, 1); the divergence counts 4^2 times.
    p, q = torch.tensor([0.0, 1.0]).softmax(0), torch.tensor([0.5, 0.0]).softmax(0)
    kl = (p * (p / q).log()).sum()
    found = distillation_loss(logits, label, teacher=teacher, alpha=0.25, temperature=4.0)
    assert float(found) == pytest.approx(float(0.75 * ce + 0.25 * 16 * kl), rel=1e-5)


def test_the_gradient_of_soft_labels_does_not_fade_with_the_temperature():
    # Hinton: with temperature^2 it tends to (student - teacher) / n_classes, for logits of mean 0.
    teacher = torch.tensor([[1.0, -1.0, 0.0]])
    for temperature in (100.0, 1000.0):
        logits = torch.zeros(1, 3, requires_grad=True)
        distillation_loss(logits, torch.tensor([0]), teacher=teacher, alpha=1.0, temperature=temperature).backward()
        assert torch.allclose(logits.grad, -teacher / 3, atol=1e-2)


def test_the_ends_of_alpha():
    logits, teacher, labels = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(
        distillation_loss(logits, labels, teacher=None, alpha=0.0, temperature=4.0), F.cross_entropy(logits, labels)
    )
    assert torch.equal(
        distillation_loss(logits, labels, teacher=teacher, alpha=0.0, temperature=4.0), F.cross_entropy(logits, labels)
    )
    nowhere = torch.full((5,), 99)
    assert bool(torch.isfinite(distillation_loss(logits, nowhere, teacher=teacher, alpha=1.0, temperature=4.0)))


# --- training


def test_without_a_teacher_it_is_plain_training(pool):
    found = train_student(tiny_model(1), pool, LABELS, **QUICK)
    twin, n = tiny_model(1).train(), len(found.selected)
    few, truth = pool.subset(found.selected), LABELS[list(found.selected)]
    schedule = Schedule(steps=6, lr=0.01)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for step in range(6):
        index = batch_order(n, 8, step, 0)
        view = step // (n // 8) % 2
        optimizer.param_groups[0]["lr"] = schedule.lr_at(step)
        optimizer.zero_grad()
        F.cross_entropy(twin(fixed_view(few.batch(index), index, view, 0, n)), truth[index]).backward()
        optimizer.step()
    assert torch.allclose(weights(found.model), weights(twin), atol=1e-6)
    assert found.alpha == 0
    assert not found.model.training


def test_an_alpha_of_0_is_the_same_with_a_teacher_who_is_not_asked(pool):
    teacher = tiny_model()
    alone = train_student(tiny_model(1), pool, LABELS, **QUICK)
    sizes = counted(teacher)
    found = train_student(tiny_model(1), pool, LABELS, teacher=teacher, alpha=0, **QUICK)
    assert torch.equal(weights(found.model), weights(alone.model))
    assert sum(sizes) == LOOKED_AT  # to see that the classes are the same


def test_an_alpha_of_1_ignores_labels(pool):
    wrong = LABELS[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    runs = [train_student(tiny_model(1), pool, y, teacher=tiny_model(), alpha=1.0, **QUICK) for y in (LABELS, wrong)]
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))
    half = [train_student(tiny_model(1), pool, y, teacher=tiny_model(), alpha=0.5, **QUICK) for y in (LABELS, wrong)]
    assert not torch.equal(weights(half[0].model), weights(half[1].model))


def test_the_teacher_passes_once_over_each_view_of_each_kept_sample(pool):
    teacher = tiny_model()
    sizes = counted(teacher)
    found = train_student(tiny_model(1), pool, LABELS, teacher=teacher, **QUICK)
    assert (len(found.selected), found.n_views, found.alpha) == (20, 2, 0.75)
    assert sum(sizes) == LOOKED_AT + 2 * 20
    # Twenty samples make two batches an epoch: six steps come to see three views, never eight.
    assert train_student(tiny_model(1), pool, LABELS, teacher=teacher, **QUICK | {"views": 8}).n_views == 3


def test_the_student_learns_the_answer_to_the_view_that_it_sees(pool):
    # A student that already is the teacher has nothing to learn from its answers, view by view.
    teacher = tiny_model()
    settings = QUICK | {"alpha": 1.0, "views": 3, "weight_decay": 0.0}
    student = nn.Sequential(clone(teacher))

    class Frozen(nn.Module):  # batch statistics would be another network's
        def __init__(self) -> None:
            super().__init__()
            self.net = student

        def forward(self, x):
            return self.net.eval()(x)

    found = train_student(Frozen(), pool, LABELS, teacher=teacher, **settings)
    assert torch.allclose(weights(found.model), weights(teacher), atol=1e-4)


def test_it_learns(pool):
    colors = torch.zeros(N, 3, 8, 8, dtype=torch.uint8)
    colors[torch.arange(N), LABELS % 3] = 200
    colors[LABELS == 3] = 200
    easy = Samples(colors, pool.ids, pool.mean, pool.std)
    found = train_student(tiny_model(1), easy, LABELS, **QUICK | {"steps": 60, "lr": 0.05})
    assert bool((found.model(easy.batch(slice(None))).argmax(-1) == LABELS).all())


def test_nothing_that_is_passed_in_is_changed(pool):
    student, teacher = tiny_model(1, dropout=0.5), tiny_model()
    with assert_untouched(student, pool), assert_untouched(teacher):
        train_student(student, pool, LABELS, teacher=teacher, adapt=Norm(), **QUICK | {"steps": 2})


def test_the_same_seed_gives_the_same_student(pool):
    def run(seed):
        return train_student(tiny_model(1, dropout=0.3), pool, LABELS, teacher=tiny_model(), seed=seed, **QUICK)

    first, again, other = run(0), run(0), run(1)
    assert first.selected == again.selected != other.selected
    assert torch.equal(weights(first.model), weights(again.model))


def test_a_killed_run_goes_on_with_what_was_answered(pool, tmp_path, monkeypatch):
    from ttmpd.training import loop as training

    settings = QUICK | {"steps": 8, "teacher": tiny_model(), "folder": tmp_path}
    whole = train_student(tiny_model(1), pool, LABELS, **settings | {"folder": None})
    true = training._Run.save
    monkeypatch.setattr("ttmpd.students.train.Loop", lambda **given: training.Loop(**given, save_seconds=-1.0))

    def stop(run, path):
        true(run, path)
        if run.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train_student(tiny_model(1), pool, LABELS, **settings)
    assert (tmp_path / WORK / "training.safetensors").exists()
    sizes = counted(settings["teacher"])
    found = train_student(tiny_model(1), pool, LABELS, **settings)
    assert sum(sizes) == LOOKED_AT
    assert torch.equal(weights(found.model), weights(whole.model))
    assert found.fit.steps == 8
    # Other labels are another run.
    assert train_student(tiny_model(1), pool, LABELS.flip(0), **settings).fit.steps == 8
    assert sum(sizes) == LOOKED_AT + LOOKED_AT + 2 * 20


def test_teacher_and_student_may_want_their_inputs_otherwise(pool):
    theirs = Samples(pool.inputs, pool.ids, (0.0,) * 3, (1.0,) * 3, names=pool.names)

    class Other(nn.Module):  # the teacher, for inputs from 0 to 1
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_model()

        def forward(self, x):
            return self.net((x - 0.5) / 0.25)

    plain = train_student(tiny_model(1), pool, LABELS, teacher=tiny_model(), **QUICK)
    other = train_student(tiny_model(1), pool, LABELS, teacher=Other().eval(), teacher_samples=theirs, **QUICK)
    assert torch.allclose(weights(plain.model), weights(other.model), atol=1e-4)


def test_adaptation_moves_the_teacher_that_teaches(pool):
    found = train_student(tiny_model(1), pool, LABELS, teacher=tiny_model(), adapt=Norm(weights=(1.0,)), **QUICK)
    assert "statistics mixed" in found.adapt_note
    assert not torch.equal(weights(found.teacher), weights(tiny_model()))


# --- what is kept


def test_the_selector_sees_teacher_and_labels(pool):
    teacher = tiny_model()
    found = train_student(tiny_model(1), pool, LABELS, teacher=teacher, select=EL2N(), **QUICK)
    assert found.selected == EL2N().select(teacher, pool, 20, labels=LABELS)


def test_quotas_by_hand():
    labels = torch.tensor([5] * 1 + [2] * 4 + [7] * 10)
    assert quotas(labels, 15) == {5: 1, 2: 4, 7: 10}
    assert quotas(labels, 9) == {5: 1, 2: 4, 7: 4}
    assert quotas(labels, 2) == {2: 1, 7: 1}
    assert quotas(labels, 99) == {5: 1, 2: 4, 7: 10}


@pytest.mark.parametrize("select", [EL2N(), None])
def test_balanced_choice(pool, select):
    labels = torch.tensor([0] * 25 + [1] * 10 + [2] * 5)
    chosen = {} if select is None else {"select": select}
    found = train_student(tiny_model(1), pool, labels, teacher=tiny_model(), balanced=True, **chosen, **QUICK)
    assert labels[list(found.selected)].bincount().tolist() == [8, 7, 5]
    if select is not None:
        first = EL2N().select(tiny_model(), pool.subset(range(25)), 8, labels=labels[:25])
        assert found.selected[:8] == first


def test_all_samples_can_be_kept(pool):
    assert train_student(tiny_model(1), pool, LABELS, **QUICK | {"fraction": 1.0}).selected == tuple(range(N))


def test_steps_per_epoch():
    assert [steps_per_epoch(n, 8) for n in (2, 8, 15, 16)] == [1, 1, 1, 2]


# --- attacks


def test_radii_by_margins_reach_the_attack(pool, monkeypatch):
    seen = []
    from ttmpd.students import train as module

    true = module.adversarial_loss

    def noted(model, batch, labels, **given):
        seen.append(given["radius"])
        return true(model, batch, labels, **given)

    monkeypatch.setattr(module, "adversarial_loss", noted)
    attack = Attack(eps=0.05, steps=1, rule="clip")
    settings = QUICK | {"steps": 2, "batch_size": 20, "views": 1}
    found = train_student(tiny_model(1), pool, LABELS, teacher=tiny_model(), select=PUMA(), alpha=0, attack=attack,
                          **settings)  # fmt: skip
    margin = margins(
        tiny_model(), pool.subset(found.selected), DeepFoolConfig(norm="linf"), labels=LABELS[list(found.selected)]
    )
    assert torch.allclose(seen[0].sort().values, radii(margin, 0.05).sort().values, atol=1e-6)
    assert bool((seen[0] <= 0.05).all())


def test_attacks_and_a_teacher_go_together(pool):
    found = train_student(tiny_model(1), pool, LABELS, teacher=tiny_model(), attack=Attack(steps=1, loss="pgd"),
                          **QUICK | {"steps": 2})  # fmt: skip
    assert found.alpha == 0.75
    # An attack that weighs nothing is plain training.
    quiet = train_student(tiny_model(1), pool, LABELS, attack=Attack(beta=0.0), **QUICK)
    assert torch.equal(weights(quiet.model), weights(train_student(tiny_model(1), pool, LABELS, **QUICK).model))


# --- bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fraction": 0.01}, "fraction must keep at least 2 samples, but 0.01 of 40 are 0; raise it"),
        ({"fraction": 1.5}, "fraction must be from 0 to 1"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1"),
        ({"alpha": "much"}, 'alpha must be "auto" or from 0 to 1'),
        ({"alpha": 0.5}, "an alpha of 0.5 must have a teacher"),
        ({"select": EL2N()}, "select el2n must have a teacher"),
        ({"attack": Attack(rule="clip")}, "radii by margins must have a teacher"),
        ({"attack": Attack(), "alpha": 1.0}, "alpha must be below 1 with an attack"),
        ({"select": Forgetting(), "balanced": True}, "balanced must be off for forgetting"),
        ({"temperature": 0.0}, "temperature"),
        ({"epochs": 3}, "a setting must be one of adapt, alpha"),
        ({"teacher_samples": tiny_samples(N, seed=9)}, "teacher_samples must be the samples in the same order"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(192, 7))}, "have 4 and 7 outputs"),
    ],
)
def test_wrong_settings(pool, wrong, message):
    with pytest.raises(InvalidValueError, match=message):
        train_student(tiny_model(1), pool, LABELS, **QUICK | wrong)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:5], "labels must be one class index per sample"),
        (LABELS.float(), "labels must be one class index per sample"),
        (LABELS + 1, "class indices from 0 to 3, since the student has 4 outputs, but got 1 to 4"),
        (LABELS - 1, "but got -1 to 2"),
    ],
)
def test_wrong_labels(pool, labels, message):
    with pytest.raises(InvalidValueError, match=message):
        train_student(tiny_model(1), pool, labels, **QUICK)


def test_a_run_that_ran_away_is_not_handed_out(pool):
    with pytest.raises(ModelError, match="lower lr"):
        train_student(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), pool, LABELS,
                      **QUICK | {"lr": 1e38, "weight_decay": 1.0})  # fmt: skip


def test_a_recipe_as_plain_data():
    plain = Recipe(select=EL2N(), attack=Attack(eps=0.1)).to_dict()
    assert plain["select"] == {"name": "el2n"}
    assert plain["attack"]["eps"] == 0.1
    assert Recipe().to_dict()["attack"] is None


def test_it_is_public():
    assert ttmpd.train_student is train_student

"""Which layers are fitted again, to what, and where."""

import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.models.modules import clone
from ttmpd.quality.damage import student_damage
from ttmpd.records import Removal
from ttmpd.repair.refit_points import find_refit_points, watch_points
from ttmpd.repair.sequential import repaired
from ttmpd.surgery.cut import cut
from ttmpd.surgery.find import find_units
from ttmpd.testing.tiny_models import tiny_model, tiny_samples, tiny_tokens, tiny_transformer, tiny_units


def sites_of(model, removals, batch, **options):
    return find_refit_points(model, cut(model, removals), removals, batch, **options)


def test_everything_behind_the_first_removal_but_the_head():
    model, batch = tiny_model(), tiny_samples(2).batch(slice(None))
    units = tiny_units(model)
    found = sites_of(model, [Removal(units[1], "drop")], batch)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    behind = [name for name in layers if layers.index(name) > layers.index(f"{units[0].path}.conv2")]
    assert [site.layer for site in found] == [name for name in behind if not name.startswith(f"{units[1].path}.")]
    assert sites_of(model, [Removal(units[1], "drop")], batch, later_layers=False) == []


def test_sums_are_wanted_where_there_is_a_shortcut():
    model = tiny_transformer()
    units = find_units(model, tiny_tokens(), ["block"]).units
    found = {site.layer: site for site in sites_of(model, [Removal(units[0], "drop")], tiny_tokens(2))}
    assert found["blocks.1.down"].adds_to_residual
    assert found["blocks.1.attention.proj"].adds_to_residual
    assert not found["blocks.1.up"].adds_to_residual
    assert {site.container for site in found.values()} <= {"blocks.1", "blocks"}


def test_what_is_left_of_a_narrowed_layer_is_known():
    model, batch = tiny_transformer(), tiny_tokens(2)
    units = [u for u in find_units(model, batch, ["neuron", "head"]).units if u.path.startswith("blocks.0")]
    removals = [Removal(unit, "narrow", (0,) if unit.kind == "head" else (1, 2, 5)) for unit in units]
    student = cut(model, removals)
    for site in sites_of(model, removals, batch):
        layer, whole = student.get_submodule(site.layer), model.get_submodule(site.layer)
        if site.kept_outputs:
            # Biases are never narrowed in another way than rows of weights.
            assert torch.equal(layer.bias, whole.bias[list(site.kept_outputs)])
        else:
            assert len(layer.weight) == len(whole.weight)
    assert any(site.kept_outputs for site in sites_of(model, removals, batch))


def test_reading_gives_inputs_answers_and_sums():
    model, batch = tiny_transformer(), tiny_tokens(2)
    units = find_units(model, batch, ["block"]).units
    site = next(s for s in sites_of(model, [Removal(units[0], "drop")], batch) if s.layer == "blocks.1.down")
    seen: dict[str, torch.Tensor] = {}
    with watch_points(model, [site], lambda _s, what, value: seen.__setitem__(what, value.clone())), torch.no_grad():
        model(batch)
    assert seen.keys() == {"input", "output", "sum"}
    assert torch.allclose(model.blocks[1].down(seen["input"]), seen["output"], atol=1e-6)
    assert not torch.allclose(seen["sum"], seen["output"])


def test_layers_behind_bring_a_student_nearer_than_stand_ins_alone():
    model, samples = tiny_model(n_blocks=5), tiny_samples(96)
    units = tiny_units(model)
    for action in ("drop", "linear"):
        removals = [Removal(units[0], action), Removal(units[1], action)]
        few, unseen = samples.first(64), samples.subset(range(64, 96))
        moved = {
            scope: student_damage(model, repaired(model, removals, few, refit_scope=scope), unseen)
            for scope in ("removed_only", "all_later_layers")
        }
        assert moved["all_later_layers"] < moved["removed_only"]


def test_a_student_of_which_nothing_went_is_the_teacher():
    model, samples = tiny_model(), tiny_samples(20)
    assert student_damage(model, repaired(model, [], samples), samples) == 0.0


def test_repair_changes_nothing_of_the_teacher_and_draws_nothing():
    model, samples = tiny_transformer(), Samples(tiny_tokens(12), tuple(map(str, range(12))))
    units = find_units(model, tiny_tokens(), ["block"]).units
    before, state = clone(model).state_dict(), torch.get_rng_state()
    repaired(model, [Removal(units[0], "linear")], samples)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())

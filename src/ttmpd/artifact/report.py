"""The facts of a run as ``report.json``, ``report.html`` and a model card: numbers here, drawing in the templates."""

import base64
import json
import math
import numbers
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ttmpd.artifact.format import UNKNOWN, count, interval, milliseconds, number, percent, spread, times

_ACTIONS = {
    "keep": "kept", "drop": "dropped", "linear": "linear stand-in", "narrow": "narrowed",
}  # fmt: skip


_MAX_CLASSES, _MAX_PARTED, _MAX_DOTS = 20, 60, 400


_PNG = re.compile(r"\AiVBORw0KGgo[A-Za-z0-9+/]{25,}={0,2}\Z")  # the signature and the width, in base64


_HUB_ID = re.compile(r"(?:timm:|hf:(?=[^/]+/))([\w.-]+(?:/[\w.-]+)?)", re.ASCII)


def write_report(facts: Mapping[str, Any], folder: Path) -> None:
    """Write ``report.json``, ``report.html`` and ``README.md`` into ``folder``, each whole or not at all.

    Args:
        facts: what the run did, as plain data; whatever is absent or None is left out of the pages.
        folder: where to write; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.dumps(_plain(facts), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    texts = ("report.json", plain), ("report.html", render_html(facts)), ("README.md", render_card(facts))
    for name, text in texts:
        unfinished = folder / f".{name}.{os.getpid()}"
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(folder / name)
        finally:
            unfinished.unlink(missing_ok=True)


def render_html(facts: Mapping[str, Any]) -> str:
    """One HTML page that loads nothing: styles, drawings and pictures are inside it."""
    known = _plain(facts)
    return _template("report.html.j2").render(
        facts=known, sentences=_sentences(known), rows=_before_after(known), units=_units_info(known),
        front=_front_info(known), latency=_latency_info(known), fit=_fit_info(known),
        confidence=_confidence_info(known), classes=_classes_info(known), parted=_parted_info(known),
        exits=_exits_info(known),
    )  # fmt: skip


def render_card(facts: Mapping[str, Any]) -> str:
    """A Hugging Face model card: YAML front matter, what was done, before and after, how to load it."""
    known = _plain(facts)
    hub = _HUB_ID.fullmatch(str(_at(known, "model", "id", default="")))
    name = hub[1] if hub else None
    return _template("card.md.j2").render(
        facts=known, sentences=_sentences(known), rows=_before_after(known),
        units=[_with_narrowing(unit) for unit in _list(known, "units") if _action(unit) != "keep"],
        exits=_exits_info(known)["rows"],
        base_model=Markup(json.dumps(name if "/" in name else f"timm/{name}")) if name else None,
        command=Markup(" ".join(str(_at(known, "command", default="")).split())),  # in an indented block: verbatim
    )  # fmt: skip


@cache
def _template(name: str) -> Template:
    """A template whose every value is escaped: by autoescape in HTML, by ``_markdown`` in the card."""
    is_html = name.endswith(".html.j2")
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=is_html,
        finalize=None if is_html else _markdown, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.globals.update(at=_at, list=_list, actions=_ACTIONS, scale=_scale, became=_became)
    made.filters.update(ms=milliseconds, number=number, count=count, percent=percent, times=times)
    made.filters.update(change=_change, show=_show, probability=_probability)
    return made.get_template(name)


def _plain(value: Any) -> Any:
    """The value as strict JSON allows it: no NaN, no tuples, no half characters, keys are text."""
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real):  # NumPy's too
        return int(value) if isinstance(value, numbers.Integral) else float(value) if math.isfinite(value) else None
    return str(value).encode("utf-8", "replace").decode()  # file names may hold bytes that are no characters


def _at(facts: Any, *keys: str, default: Any = None) -> Any:
    """What lies under the nested keys, or ``default`` when any of them is absent or None."""
    for key in keys:
        facts = facts.get(key) if isinstance(facts, dict) else None
    return default if facts is None else facts


def _list(facts: Any, *keys: str) -> list[Any]:
    return [item for item in _at(facts, *keys, default=[]) if item is not None]


def _change(before: float | None, after: float | None) -> str:
    if not before or after is None:
        return UNKNOWN
    return "unchanged" if after == before else f"{100 * (after / before - 1):+.1f} %".replace("-", "−")


def _show(value: Any) -> str:
    """Any setting, readable."""
    if value is None or value == "":
        return UNKNOWN
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _markdown(value: Any) -> Any:
    """Text that Markdown and HTML leave as it is; Markup passes."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _spread(timing: Any) -> str:
    return spread(*(_at(timing, part) for part in ("median_ms", "low_ms", "high_ms")))


def _became(facts: Any) -> str:
    """What was done to the model, in a word or two."""
    exits = "with early exits" if _at(facts, "early_exit") else ""
    return exits or ("compressed" if _at(facts, "target") else "adapted")


def _sentences(facts: Any) -> list[str]:
    """What was done and whether the target is met, in words."""
    actions = Counter(_action(unit) for unit in _list(facts, "units"))
    n_removed = sum(actions.values()) - actions["keep"]
    removed = f"{n_removed} of {sum(actions.values())} removable units were {'cut' if actions['narrow'] else 'removed'}"
    kinds = [f"{actions['drop']} dropped"]
    kinds += [f"{actions['linear']} replaced by a {_ACTIONS['linear']}"] if actions["linear"] else []
    kinds += [f"{actions['narrow']} narrowed"] if actions["narrow"] else []
    done = f"{removed}: {', '.join(kinds)}." if n_removed else "Nothing was removed."
    done = _exits_sentence(facts) or _lossless_sentence(facts) + done
    asked, budget = _at(facts, "target", "asked"), _at(facts, "target", "budget_ms")
    if asked is None and budget is None:
        return [done]
    # The speedup first: machines change their pace between planning and the last measurement, ratios do not.
    measured, speedup = _at(facts, "latency", "compressed", "median_ms"), _at(facts, "latency", "speedup", "median")
    found = "" if measured is None else f": measured {milliseconds(measured)} ms"
    found = found if speedup is None else f": measured {times(speedup)} as fast"
    near = " within the spread" if _at(facts, "target", "within_spread") else ""
    words = {True: f"is met{near}{found}", False: f"is missed{found}", None: "was not checked"}
    what = asked or f"{milliseconds(budget)} ms per batch"
    noise = [f"{told}."] if (told := _at(facts, "latency", "noise")) else []
    noise += [told] if (told := _at(facts, "restarted")) else []
    return [done, f"The target, {what}, {words[_at(facts, 'target', 'met')]}.", *noise]


def _lossless_sentence(facts: Any) -> str:
    """What made the model faster without changing its answers; "" when nothing did."""
    faster = _at(facts, "latency", "lossless_speedup")
    what = _at(facts, "lossless", default="")
    return f"Alone, {what} leaves all answers as they are and makes it {times(faster)} as fast. " if faster else ""


def _before_after(facts: Any) -> list[tuple[str, str, str, str]]:
    """Rows of the table: what, original, compressed, change."""
    original, compressed = (_at(facts, "latency", key) for key in ("original", "compressed"))
    slow, fast = _at(original, "median_ms"), _at(compressed, "median_ms")
    size, speedup = _at(facts, "machine", "batch_size"), _at(facts, "latency", "speedup", "median")
    faster = _change(slow, fast) if speedup is None else f"{times(speedup)} as fast"
    rows = [
        ("Milliseconds per batch" + (f" of {size}" if size else ""), _spread(original), _spread(compressed), faster)
    ]
    unpruned, gained = _at(facts, "latency", "lossless"), _at(facts, "latency", "lossless_speedup")
    if unpruned and gained:
        rows.append((f"… after {_at(facts, 'lossless')} alone", "", _spread(unpruned), f"{times(gained)} as fast"))
    if size and slow and fast:
        before, after = 1000 * size / slow, 1000 * size / fast
        rows.append(("Samples per second", number(before), number(after), _change(before, after)))
    for name, key in (("Parameters", "parameters"), ("MACs per sample", "macs")):
        before, after = _at(facts, "model", key), _at(facts, "student", key)
        rows.append((name, count(before), count(after), _change(before, after)))
    for name, key in (("before distillation", "agreement_repaired"), ("at the end", "agreement")):
        alike = _at(facts, key)
        if alike is not None:
            share = interval(*(_at(alike, part) for part in ("share", "low", "high")))
            rows.append((f"Agreement with the teacher, {name}", "", share, ""))
    return rows


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to places on paper."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round values within the scale, with their text."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        places = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [(i * step, f"{round(i * step, 12):g}") for i in places]


def _scale(values: Sequence[float | None], start: float, end: float, *, zero: bool = False) -> _Scale:
    """A scale that holds all values with some air; ``zero``: and begins at zero."""
    known = [value for value in values if value is not None] or [0.0, 1.0]
    low, high = (min(0.0, *known) if zero else min(known)), max(known)
    air = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return _Scale(low if zero else low - air, high + air, start, end)


def _action(unit: Any) -> str:
    return action if (action := str(_at(unit, "action"))) in _ACTIONS else "keep"


def _with_narrowing(unit: Any) -> dict[str, Any]:
    """The unit with its action, and for a narrowed one the harm of its width."""
    found = {**unit, "action": _action(unit), "done": _ACTIONS[_action(unit)]}
    if found["action"] == "narrow":
        kept, members = _at(unit, "kept"), _at(unit, "members")
        harms = {row[0]: row[1] for row in _list(unit, "width_harms") if isinstance(row, list) and len(row) == 2}
        found |= {"harm_narrow": harms.get(kept), "done": f"narrowed to {_show(kept)} of {_show(members)}"}
    return found


def _units_info(facts: Any) -> dict[str, Any]:
    """Units with their action, and the longest bars."""
    units = [_with_narrowing(unit) for unit in _list(facts, "units")]
    harms = [_at(unit, f"harm_{action}", default=0.0) for unit in units for action in _ACTIONS]
    parts = list(dict.fromkeys(name for unit in units for name in _at(unit, "parts", default={})))
    most_ms = max([0.0, *(_at(unit, "ms", default=0.0) for unit in units)])
    offered = [action for action in _ACTIONS if any(_at(unit, f"harm_{action}") is not None for unit in units)]
    return {
        "units": units,
        "offered": offered,
        "most_harm": max([0.0, *harms]),
        "most_ms": most_ms,
        "parts": parts,
    }


def _front_info(facts: Any) -> dict[str, Any]:
    """Predicted (ms, harm) of every plan on the front, and of the chosen one."""
    points = [p for p in _list(facts, "front") if None not in (_at(p, "predicted_ms"), _at(p, "harm"))]
    points.sort(key=lambda p: float(p["predicted_ms"]))
    harms = [_at(unit, f"harm_{_action(unit)}", default=0.0) for unit in _list(facts, "units")]  # a kept unit has none
    chosen_ms = _at(facts, "latency", "predicted_ms") if harms else None
    summed = sum(max(harm, 0.0) for harm in harms)
    return {"points": points, "chosen_ms": chosen_ms, "chosen_harm": _at(facts, "target", "harm", default=summed)}


def _latency_info(facts: Any) -> list[dict[str, Any]]:
    """Original and compressed: timing with the rounds, thinned evenly."""
    rounds = [(key, _list(facts, "latency", f"{key}_ms")) for key in ("original", "compressed")]
    thinned = [(key, ms[:: 1 + len(ms) // _MAX_DOTS]) for key, ms in rounds if ms]
    return [{"name": key, "rounds": ms, "timing": _at(facts, "latency", key)} for key, ms in thinned]


def _fit_info(facts: Any) -> dict[str, list[tuple[float, float]]]:
    """Three curves over the steps. The first check is before training, so it has no training loss."""
    checks = [check for check in _list(facts, "fit", "checks") if len(check) == 3]
    losses, steps = _at(facts, "fit", "losses", default=[]), [check[0] for check in checks[1:]]
    if len(steps) != len(losses):
        apart = _at(facts, "fit", "steps", default=len(losses)) / max(1, len(losses))
        steps = [apart * (i + 1) for i in range(len(losses))]
    curves = {
        "agreement": [(step, share) for step, share, _ in checks],
        "held-out loss": [(step, loss) for step, _, loss in checks],
        "training loss": list(zip(steps, losses, strict=True)),
    }
    return {name: [point for point in curve if None not in point] for name, curve in curves.items()}


def _confidence_info(facts: Any) -> dict[str, list[int]]:
    """How many held-out samples fall into each tenth of confidence."""
    values = {who: _list(facts, "held_out", f"{who}_confidence") for who in ("teacher", "student")}
    tenths = {who: Counter(min(9, int(10 * value)) for value in known) for who, known in values.items() if known}
    return {who: [found[i] for i in range(10)] for who, found in tenths.items()}


def _class_name(facts: Any, index: Any) -> str:
    names = _at(facts, "class_names", default=[])
    return str(names[index]) if index is not None and 0 <= index < len(names) else f"class {_show(index)}"


def _classes_info(facts: Any) -> dict[str, Any]:
    """Predicted classes by how much their count changes: (name, teacher, student); and how many are not shown."""
    teacher, student = (Counter(_list(facts, "held_out", who)) for who in ("teacher", "student"))
    order = sorted({*teacher, *student}, key=lambda i: (-abs(student[i] - teacher[i]), -teacher[i], i))
    rows = [(_class_name(facts, i), teacher[i], student[i]) for i in order]
    most = max((max(row[1:]) for row in rows), default=0)
    return {"rows": rows[:_MAX_CLASSES], "n_hidden": len(rows[_MAX_CLASSES:]), "most": most}


def _parted_info(facts: Any) -> dict[str, Any]:
    """Samples on which student and teacher part; a picture that is no base64 PNG is left out."""
    found, items = _list(facts, "parted"), []
    answers = (_at(facts, "held_out", who, default=[]) for who in ("teacher", "student"))
    n_parted = sum(a != b for a, b in zip(*answers, strict=False))
    for item in found[:_MAX_PARTED]:
        teacher, student = (_class_name(facts, _at(item, who)) for who in ("teacher", "student"))
        png = "".join(_PNG.findall(str(_at(item, "png"))))
        small = bool(png) and int.from_bytes(base64.b64decode(png[:32])[16:20]) < 100  # its width, from the header
        items.append({**item, "teacher": teacher, "student": student, "png": png, "small": small})
    return {"items": items, "n_parted": max(n_parted, len(found))}


def _exits_sentence(facts: Any) -> str:
    """Where samples may leave, and when; "" for a model without exits."""
    exits, threshold = _list(facts, "early_exit", "exits"), _at(facts, "early_exit", "threshold")
    if not exits or threshold is None:
        return ""
    values = [_at(row, "threshold", default=threshold) for row in exits]
    least = " to ".join(dict.fromkeys(_probability(value) for value in (min(values), max(values))))
    when = f"has a probability of at least {least}" if threshold <= 1 else "would have to be surer than sure: none does"
    return f"Samples may leave behind {len(exits)} blocks; one does where its answer {when}."


def _probability(value: float | None) -> str:
    """Four figures: what is close to 1 must not look like it."""
    return UNKNOWN if value is None else f"{value:.4g}"


def _exits_info(facts: Any) -> dict[str, Any]:
    """Exits with their share of the samples, the end as the last; (ms, agreement) of all thresholds and the chosen."""
    found = _at(facts, "early_exit", default={})
    rows = _list(found, "exits")
    rows += [{"path": "the end", **_at(found, "end", default={})}] if rows else []
    points = [(_at(row, "ms"), _at(row, "agreement")) for row in _list(found, "curve")]
    chosen = (_at(found, "predicted_ms"), _at(found, "agreement"))
    return {
        "rows": rows,
        "points": sorted({point for point in points if None not in point}),
        "chosen": None if None in chosen else chosen,
        "most": max((_at(row, "share", default=0.0) for row in rows), default=0.0),
    }

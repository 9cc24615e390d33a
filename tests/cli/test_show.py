"""What commands share of what they print."""

from ttmpd.cli import show as display


class Recorder:
    """Stands for rich's Progress."""

    def __init__(self) -> None:
        self.log: list[object] = []

    def add_task(self, name, total):
        self.log.append(("add", name, total))
        return 7

    def update(self, bar, completed, total):
        self.log.append(("at", completed))

    def remove_task(self, bar):
        self.log.append("remove")


def test_bars_are_for_long_stages_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    recorder = Recorder()
    bars = display._Bars(recorder)
    for done in range(1, 11):
        bars("short", done, 10)
    assert recorder.log == []
    for done in range(1, 5):
        now[0] += 0.6
        bars("long", done, 4)
    assert recorder.log == [("add", "long", 4), ("at", 3), "remove"]

"""Alarms: k of the last n, hysteresis, latch, acknowledge; against a model with hypothesis."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import pytest
from andon.runtime.alarm import KINDS, AlarmBoard, AlarmRule, payload
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule


def states(board: AlarmBoard) -> dict[str, str]:
    return {alarm.kind: alarm.state for alarm in board.alarms}


def feed(board: AlarmBoard, labels: str) -> list[tuple[str, str, str]]:
    names = {"o": "OK", "n": "NG", "u": "UNKNOWN"}
    events = [event for letter in labels for event in board.verdict(names[letter], "engine_error")]
    return [(event.kind, event.before, event.alarm.state) for event in events]


def test_raised_at_exactly_k_of_n() -> None:
    board = AlarmBoard("cam0", AlarmRule(k=3, n=5))
    assert feed(board, "nonoo") == []
    assert feed(board, "non") == []  # o n o o n o n: the window is o o n o n
    assert feed(board, "n") == [("defect", "cleared", "raised")]


def test_the_alarm_names_the_last_part_where_it_has_a_name() -> None:
    board = AlarmBoard("cam0", AlarmRule(k=1, n=2))
    for part_id, detail in (
        ("A-7", "1 NG of the last 1 verdicts, last part A-7"),
        (None, "2 NG of the last 2 verdicts"),
    ):
        (event,) = board.verdict("NG", part_id=part_id)
        assert event.alarm.detail == detail
        board.condition("defect", False)


def test_hysteresis_holds_between_clear_and_k() -> None:
    board = AlarmBoard("cam0", AlarmRule(k=3, n=4, clear=1, latch=False))
    feed(board, "nnn")
    assert feed(board, "oo") == []  # window n n o o: two are more than clear
    assert feed(board, "o") == [("defect", "raised", "cleared")]


def test_latched_until_acknowledged() -> None:
    board = AlarmBoard("cam0", AlarmRule(k=1, n=1))
    assert feed(board, "no") == [("defect", "cleared", "raised"), ("defect", "raised", "latched")]
    assert feed(board, "n") == [("defect", "latched", "raised")]
    assert [a.count for a in board.active] == [2]
    feed(board, "o")
    events = board.acknowledge(by="Ada")
    assert [(e.before, e.alarm.state, e.alarm.by) for e in events] == [("latched", "cleared", "Ada")]
    assert board.active == () and board.alarms[0].count == 0


def test_acknowledged_alarm_clears_with_its_condition() -> None:
    board = AlarmBoard("cam0", AlarmRule(k=1, n=1))
    feed(board, "n")
    assert [e.alarm.state for e in board.acknowledge("defect")] == ["acknowledged"]
    assert board.acknowledge("defect") == []
    assert feed(board, "no") == [("defect", "acknowledged", "cleared")]


def test_a_further_cause_raises_again_with_its_detail() -> None:
    board = AlarmBoard("cam0", AlarmRule())
    board.condition("delivery", True, "away")
    assert board.condition("delivery", True, "away, and more of it") == []
    (event,) = board.condition("delivery", True, "lost; away", further=True)
    assert (event.before, event.alarm.state, event.alarm.detail) == ("raised", "raised", "lost; away")
    assert event.alarm.count == 1
    board.acknowledge("delivery", by="Ada")
    (event,) = board.condition("delivery", True, "refused", further=True)
    assert (event.before, event.alarm.state, event.alarm.count, event.alarm.by) == ("acknowledged", "raised", 2, None)


def test_a_cause_that_is_gone_changes_the_detail_of_an_alarm_that_stands() -> None:
    board = AlarmBoard("cam0", AlarmRule())
    assert board.renew("drift", "nut") == []
    board.condition("drift", True, "bolt; nut")
    (event,) = board.renew("drift", "nut")
    assert (event.before, event.alarm.state, event.alarm.detail, event.alarm.count) == ("raised", "raised", "nut", 1)
    assert board.renew("drift", "nut") == []
    board.acknowledge("drift", by="Ada")
    (event,) = board.renew("drift", "nut, still")
    assert (event.alarm.state, event.alarm.detail, event.alarm.by) == ("acknowledged", "nut, still", "Ada")
    board.condition("drift", False)
    assert board.renew("drift", "bolt") == []


def test_unknown_has_an_alarm_of_its_own_and_leaves_the_window_alone() -> None:
    board = AlarmBoard("cam0", AlarmRule(k=2, n=3, cannot_judge_after=3))
    assert feed(board, "nuu") == []
    assert feed(board, "u") == [("cannot_judge", "cleared", "raised")]
    assert "engine_error" in board.active[0].detail
    assert feed(board, "n") == [("cannot_judge", "raised", "latched"), ("defect", "cleared", "raised")]


def test_one_unknown_may_be_enough() -> None:
    board = AlarmBoard("cam0", AlarmRule(cannot_judge_after=1, latch=False))
    assert feed(board, "uo") == [("cannot_judge", "cleared", "raised"), ("cannot_judge", "raised", "cleared")]


def test_unknown_can_count_as_ng() -> None:
    board = AlarmBoard("cam0", AlarmRule(k=2, n=3, unknown="count", cannot_judge_after=None))
    assert feed(board, "uu") == [("defect", "cleared", "raised")]


def test_state_survives_a_restart() -> None:
    before = AlarmBoard("cam0", AlarmRule(k=2, n=3))
    feed(before, "nn")
    before.condition("camera", True, "no frames for 5 s")
    after = AlarmBoard("cam0", AlarmRule(k=2, n=3))
    after.restore(json.loads(json.dumps(before.dump())))
    assert states(after) == states(before)
    assert feed(after, "ooo") == feed(before, "ooo") == [("defect", "raised", "latched")]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_longer_window_counts_at_once_after_a_restart_too(restarted: bool) -> None:
    board = AlarmBoard("cam0", AlarmRule(k=3, n=5))
    feed(board, "ooooo")
    if restarted:
        dumped = board.dump()
        board = AlarmBoard("cam0", AlarmRule(k=3, n=5))
        board.restore(dumped)
    board.rule = AlarmRule(k=6, n=10)  # as a reload does
    assert feed(board, "nnnnn") == []
    assert feed(board, "n") == [("defect", "cleared", "raised")]


def test_a_shorter_window_after_a_restart_forgets_the_oldest() -> None:
    before = AlarmBoard("cam0", AlarmRule(k=3, n=5))
    feed(before, "nnooo")
    after = AlarmBoard("cam0", AlarmRule(k=2, n=3))
    after.restore(before.dump())
    assert feed(after, "n") == []
    assert feed(after, "n") == [("defect", "cleared", "raised")]


def test_after_a_product_change_the_verdicts_before_count_no_more_and_alarms_stay() -> None:
    board = AlarmBoard("cam0", AlarmRule(k=2, n=5, cannot_judge_after=2))
    board.condition("camera", True, "gone")
    feed(board, "nu")
    board.reset_window()
    assert feed(board, "un") == [] and states(board)["camera"] == "raised"
    assert feed(board, "n") == [("defect", "cleared", "raised")]


def test_what_another_version_saved_of_alarms_is_taken_over_as_far_as_it_is_known() -> None:
    board = AlarmBoard("cam0", AlarmRule())
    board.restore({"alarms": [{"kind": "smell", "state": "raised"}, {"kind": "drift", "state": "raised", "of": 1}]})
    assert [(alarm.kind, alarm.state) for alarm in board.active] == [("drift", "raised")]
    assert feed(board, "uunn") == [] and feed(board, "n") == [("defect", "cleared", "raised")]


@pytest.mark.parametrize("rule", [{"k": 0}, {"k": 6, "n": 5}, {"k": 2, "clear": 2}, {"cannot_judge_after": 0}])
def test_impossible_rules_are_refused(rule: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="found"):
        AlarmRule(**rule)


def test_message_says_the_worst_state_of_the_board() -> None:
    board = AlarmBoard("cam0", AlarmRule(k=1, n=1), now=lambda: datetime(2026, 1, 2, tzinfo=timezone.utc))
    feed(board, "n")
    board.acknowledge()
    (event,) = board.condition("camera", True, "gone")
    message = json.loads(payload("01M80DF570B4VNQ8GGGQMJ0155", "cam0", board.alarms, event))
    assert message["state"] == "raised" and message["ts"] == "2026-01-02T00:00:00.000Z"
    assert [(a["kind"], a["state"]) for a in message["alarms"]] == [("defect", "acknowledged"), ("camera", "raised")]
    assert message["event"] == {"kind": "camera", "from": "cleared", "to": "raised", "detail": "gone", "by": None}
    board.condition("camera", False)
    again = json.loads(payload("01M80DF570B4VNQ8GGGQMJ0155", "cam0", board.alarms))
    assert (again["state"], again["event"], len(again["alarms"])) == ("latched", None, 2), "before what is acknowledged"
    board.acknowledge("camera")
    assert json.loads(payload("01M80DF570B4VNQ8GGGQMJ0155", "cam0", board.alarms))["state"] == "acknowledged"
    feed(board, "o")
    assert json.loads(payload("01M80DF570B4VNQ8GGGQMJ0155", "cam0", board.alarms))["state"] == "cleared"


class AlarmMachine(RuleBasedStateMachine):
    """The board against the rule said in other words: over the whole history instead of a running window."""

    @initialize(n=st.integers(1, 6), data=st.data(), latch=st.booleans(), unknown=st.sampled_from(["ignore", "count"]))
    def begin(self, n: int, data: st.DataObject, latch: bool, unknown: str) -> None:
        k = data.draw(st.integers(1, n))
        clear = data.draw(st.integers(0, k - 1))
        self.rule = AlarmRule(k=k, n=n, clear=clear, latch=latch, unknown=unknown, cannot_judge_after=2)
        self.board = AlarmBoard("cam0", self.rule)
        self.history: list[str] = []
        self.counted: list[bool] = []
        self.present = dict.fromkeys(KINDS, False)
        self.state = dict.fromkeys(KINDS, "cleared")

    def expect(self, kind: str, present: bool) -> None:
        was, self.present[kind] = self.present[kind], present
        state = self.state[kind]
        if present and not was and state in ("cleared", "latched"):
            self.state[kind] = "raised"
        if not present and was:
            self.state[kind] = "latched" if state == "raised" and self.rule.latch else "cleared"

    @rule(label=st.sampled_from(["OK", "NG", "UNKNOWN"]))
    def verdict(self, label: str) -> None:
        before = states(self.board)
        events = self.board.verdict(label, "x")
        self.history.append(label)
        self.expect("cannot_judge", self.history[-2:] == ["UNKNOWN", "UNKNOWN"])
        if label != "UNKNOWN" or self.rule.unknown == "count":
            self.counted.append(label != "OK")
            bad = sum(self.counted[-self.rule.n :])
            if bad >= self.rule.k or bad <= self.rule.clear:
                self.expect("defect", bad >= self.rule.k)
        self.follow(before, events)

    @rule(kind=st.sampled_from(["camera", "drift", "delivery"]), present=st.booleans())
    def condition(self, kind: str, present: bool) -> None:
        before = states(self.board)
        self.expect(kind, present)
        self.follow(before, self.board.condition(kind, present, "why"))

    @rule(kind=st.sampled_from([None, *KINDS]))
    def acknowledge(self, kind: str | None) -> None:
        before = states(self.board)
        for each in KINDS if kind is None else (kind,):
            moves = {"raised": "acknowledged", "latched": "cleared"}
            self.state[each] = moves.get(self.state[each], self.state[each])
        self.follow(before, self.board.acknowledge(kind, by="somebody"))

    @rule()
    def restart(self) -> None:
        board = AlarmBoard("cam0", self.rule)
        board.restore(json.loads(json.dumps(self.board.dump())))
        self.board = board

    def follow(self, before: dict[str, str], events: list) -> None:
        """The events are exactly the steps from the states before to those after."""
        for event in events:
            assert before[event.kind] == event.before != event.alarm.state
            before[event.kind] = event.alarm.state
        assert before == states(self.board)

    @invariant()
    def same_states(self) -> None:
        if hasattr(self, "board"):
            assert states(self.board) == self.state


TestAlarmMachine = AlarmMachine.TestCase

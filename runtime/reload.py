"""Taking over a changed configuration while the line runs: what can change between two frames does, the rest is named.

All or nothing: a configuration with an error, an unknown product or a source that is refused changes nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .classifier import log_classifier
from .errors import ConfigError
from .lineconfig import CameraConfig, LineConfig
from .linecrop import log_crops
from .linethresholds import log_thresholds
from .products import require_products
from .source import make_source
from .startup import alarm_rule, effective

if TYPE_CHECKING:
    from .app import LineApp
log = logging.getLogger("andon.line")

#: Keys of a camera that are read anew for every frame.
LIVE = frozenset(
    {"product", "roi", "max_fps", "stale_after", "stale_verdict_every", "retry_max", "deadline_ms", "smoothing"}
)


def reload(app: LineApp) -> dict[str, list[str]]:
    """Read the configuration again and apply it; which keys were taken over and which need a restart.

    Raises:
        AndonError: the new configuration is refused; the old one stays in force.
    """
    old, wanted = app.config, effective(app.options)
    applied: list[str] = []
    restart = [
        name
        for name in LineConfig.model_fields
        if name not in ("cameras", "judge", "alarm") and getattr(old, name) != getattr(wanted, name)
    ]
    if set(old.cameras) != set(wanted.cameras):
        raise ConfigError(
            "cameras cannot be added or removed while the line runs",
            found=", ".join(wanted.cameras),
            expected=", ".join(old.cameras),
            next_step="restart the line",
        )
    cameras = {name: _camera(name, old.cameras[name], new, applied, restart) for name, new in wanted.cameras.items()}
    for name in ("judge", "alarm"):
        if getattr(old, name) != getattr(wanted, name):
            applied.append(name)
    config = old.model_copy(update={"cameras": cameras, "judge": wanted.judge, "alarm": wanted.alarm})
    sources = {
        name: make_source(name, camera) for name, camera in cameras.items() if camera.source != old.cameras[name].source
    }
    for source in sources.values():
        source.check()
    changed = app.worker.call(lambda: _apply(app, config))
    if (judge := app.worker.judge) is not None:
        log_crops(config, judge.detector.bundle, app.overrides.products)
        log_thresholds(config, judge.detector.bundle, app.overrides.stored)
        log_classifier(config, judge.detector.bundle, app.overrides.products)
    for name, camera in cameras.items():
        app.cameras[name].configure(camera)
        if name in sources:
            app.replace_source(name, sources[name])
    for name in cameras if "judge" in applied else changed:
        app.delivery.announce(name)
    log.info("reloaded: %s", ", ".join(applied) or "nothing has changed")
    if restart:
        log.warning("changed, but only taken over by a restart: %s", ", ".join(restart))
    return {"applied": applied, "restart": restart}


def _camera(name: str, old: CameraConfig, new: CameraConfig, applied: list[str], restart: list[str]) -> CameraConfig:
    """The camera's settings that will be in force."""
    changes: dict[str, Any] = {}
    for key in CameraConfig.model_fields:
        if getattr(old, key) == getattr(new, key):
            continue
        if key in LIVE or key == "source" or (key == "trigger" and _same_mode(old, new)):
            changes[key] = getattr(new, key)
            applied.append(f"cameras.{name}.{key}")
        else:
            restart.append(f"cameras.{name}.{key}")
    return old.model_copy(update=changes)


def _same_mode(old: CameraConfig, new: CameraConfig) -> bool:
    return old.trigger is not None and new.trigger is not None and old.trigger.only == new.trigger.only


def _apply(app: LineApp, config: LineConfig) -> list[str]:
    """On the judging thread, between two frames. What does not fit the bundle is refused before a thing changed.

    Returns the cameras that expect another product now.
    """
    judge = app.worker.judge
    if judge is None:
        raise ConfigError("the line is still starting", next_step="reload again when it runs")
    require_products(config, judge.detector.bundle)
    before = {name: judge.product_of(name) for name in app.boards}
    judge.configure(config.cameras, config.judge)
    app.config = config
    app.say_thresholds(judge)
    rule = alarm_rule(config.alarm)
    changed = [name for name in app.boards if judge.product_of(name) != before[name]]
    for name, board in app.boards.items():
        board.rule = rule
        app.state.expects(name, judge.product_of(name))
    for name in changed:  # as the command `product` does: one product's verdicts are no reason for another's alarm
        app.boards[name].reset_window()
    return changed

"""Home Assistant's device discovery: one retained JSON message per camera that describes our topics.

https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload (Home Assistant 2024.11 and newer)
"""

from __future__ import annotations

from typing import Any

from ... import __version__
from ..verdict import dumps
from .identity import joined


def discovery(prefix: str, base: str, camera: str) -> tuple[str, bytes]:
    """Topic and payload for one camera.

    Args:
        prefix: discovery prefix of Home Assistant, usually ``homeassistant``.
        base: the station's topic, ``andon/v1/<site>/<line>/<station>``.
    """
    identifier = joined(["andon", *base.split("/")[2:], camera], "_", illegal="[^A-Za-z0-9_-]")
    topic = f"{base}/{camera}"
    document: dict[str, Any] = {
        "device": {
            "identifiers": [identifier],
            "name": f"{base.rsplit('/', 1)[1]} {camera}",
            "manufacturer": "Andon",
            "model": "Visual anomaly detection",
            "sw_version": __version__,
        },
        "origin": {"name": "andon", "sw_version": __version__},
        "availability_topic": f"{topic}/status",
        "availability_template": "{{ 'online' if value_json.state == 'online' else 'offline' }}",
        "qos": 1,
        "components": _components(topic, identifier),
    }
    return f"{prefix}/device/{identifier}/config", dumps(document)


def _components(topic: str, identifier: str) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {
        "verdict": {
            "platform": "sensor",
            "name": "Verdict",
            "device_class": "enum",
            "options": ["OK", "NG", "UNKNOWN"],
            "state_topic": f"{topic}/verdict",
            "value_template": "{{ value_json.label }}",
            "json_attributes_topic": f"{topic}/verdict",
        },
        "score": {
            "platform": "sensor",
            "name": "Score",
            "state_class": "measurement",
            "state_topic": f"{topic}/verdict",
            "value_template": "{{ value_json.score }}",
        },
        "alarm": {
            "platform": "binary_sensor",
            "name": "Alarm",
            "device_class": "problem",
            "state_topic": f"{topic}/alarm",
            "value_template": "{{ 'OFF' if value_json.state == 'cleared' else 'ON' }}",
            "json_attributes_topic": f"{topic}/alarm",
        },
        "acknowledge": {
            "platform": "button",
            "name": "Acknowledge alarms",
            "command_topic": f"{topic}/cmd/acknowledge",
            "payload_press": '{"by":"Home Assistant"}',
        },
    }
    return {name: {**part, "unique_id": f"{identifier}_{name}"} for name, part in parts.items()}

"""A model's name: what state of a line (memory, drift references, thresholds by command) is bound to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .manifest import Manifest


def model_id(manifest: Manifest) -> str:
    """Identity of the model: of all that the manifest says but thresholds, of cameras too.

    Without what is as it is by default: a field that a later Andon adds, or that `andon calibrate` of one writes into
    the file, must not make another model of it, whose memory and overrides would not be taken any more.
    """
    calibrated = {"thresholds", "camera_thresholds"}
    said = manifest.model_dump(mode="json", by_alias=True, exclude=calibrated, exclude_defaults=True)
    return _short_hash(json.dumps(said, sort_keys=True))


#: Fields that the manifest got after the first and after the second of the former ids; one that it gets now is added
#: to both. Not all steps run a stage, and a program is a step deep in `program`, two in `alternatives`.
_NO_RUN_INPUTS = {"program": {"__all__": {"inputs"}}, "alternatives": {"__all__": {"__all__": {"inputs"}}}}
_LATER_FIELDS: tuple[dict[str, Any], ...] = (_NO_RUN_INPUTS, {})


def former_ids(manifest: Manifest) -> tuple[str, ...]:
    """The model's ids of earlier versions: hashes of the whole manifest, fields as they are by default included."""
    bare = manifest.model_copy(update={"thresholds": {}, "camera_thresholds": {}})
    texts = [bare.model_dump_json(by_alias=True, exclude=later) for later in _LATER_FIELDS]
    return tuple(dict.fromkeys(_short_hash(text) for text in texts))


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]

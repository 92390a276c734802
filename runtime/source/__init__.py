"""Sources of frames: GStreamer pipelines and image files, each run by a camera thread (camera.py)."""

from __future__ import annotations

from ..lineconfig import CameraConfig
from ..sourceconfig import DatasetSource, FolderSource
from .base import EndOfSource, Shot, Source

__all__ = ["EndOfSource", "Shot", "Source", "make_source"]


def make_source(name: str, camera: CameraConfig) -> Source:
    """The source of a configured camera, not opened. GStreamer is imported only if the source needs it.

    Raises:
        SourceError: it can never be opened as configured.
    """
    if isinstance(camera.source, FolderSource | DatasetSource):
        if camera.source.player == "direct":
            from .playlist import FolderPlayer

            return FolderPlayer(camera.source)
        from .player import PipelinePlayer

        return PipelinePlayer(camera.source)
    from .pipelines import camera_source

    return camera_source(name, camera)

"""Base of the sections of a line configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

Seconds = Annotated[float, Field(gt=0)]


def absolute(path: Path, info: ValidationInfo) -> Path:
    """Make a path of the file absolute, once, here: nobody else needs to know where the file lies.

    Links stay as they are named: a certificate that is renewed or a bundle that is replaced by pointing its link
    elsewhere is found at the next look. Only what stands before a .. is followed, which alone says what that means.
    """
    whole = Path((info.context or {}).get("base", "."), path.expanduser()).absolute()
    ups = [index for index, part in enumerate(whole.parts) if part == ".."]
    if not ups:
        return whole
    return Path(*whole.parts[: ups[-1] + 1]).resolve().joinpath(*whole.parts[ups[-1] + 1 :])


LocalPath = Annotated[Path, AfterValidator(absolute)]


class Settings(BaseModel):
    """Base of all sections: unknown keys are refused, values do not change after loading.

    A secret is named by an environment variable (`..._env`) or by a file (`..._file`); both are refused, for only one
    of them would count, and perhaps the other is the one that is renewed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_place_per_secret(self) -> Settings:
        for env in (name for name in type(self).model_fields if name.endswith("_env")):
            file = env.removesuffix("_env") + "_file"
            if getattr(self, env) is not None and getattr(self, file, None) is not None:
                raise ValueError(f"needs one of {env} and {file}, found both; remove the one that is not meant")
        return self

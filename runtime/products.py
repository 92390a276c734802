"""Which products a line's frames can be judged as: what a start, a reload, a command and `andon check` refuse."""

from __future__ import annotations

from .bundle import Bundle
from .detector import AUTO
from .errors import ConfigError, ProductError
from .lineconfig import CameraConfig, LineConfig
from .linecrop import require_crop


def require_products(config: LineConfig, bundle: Bundle) -> None:
    """Refuse products of cameras and thresholds that the bundle does not know, and what needs a classifier without one.

    Raises:
        ProductError: a product is unknown; names where the configuration has it.
        ConfigError: `auto` of several products, or judge.check_product, and the bundle has no classifier; or `auto`
            of a camera without a roi, and what is judged of its pictures depends on the product.
    """
    classes = ", ".join(bundle.manifest.classes)
    places = {f"cameras.{name}.product": camera.product for name, camera in config.cameras.items()}
    places |= {f"judge.thresholds.{product}": product for product in config.judge.thresholds}
    for place, product in places.items():
        if product != AUTO and product not in bundle.manifest.classes:
            raise ProductError(
                f"{place}: unknown product {product!r}",
                found=product,
                expected=f"{classes} (the products of {bundle.path})",
                next_step="name one of these in the configuration, or train on images of the new product",
            )
    autos = [name for name, each in config.cameras.items() if each.product == AUTO and not tells_product(each, bundle)]
    if autos:
        raise ConfigError(
            f"product: auto of {', '.join(autos)}: the bundle has no classifier",
            found=AUTO,
            expected=f"one of {classes}",
            next_step="name the camera's product",
        )
    for name, camera in config.cameras.items():
        require_crop(name, camera, camera.product, bundle, config.program)
    if config.judge.check_product and bundle.manifest.outputs.logits is None:
        raise ConfigError(
            "judge.check_product: the bundle has no classifier that could see another product",
            found=f"a {bundle.manifest.method} bundle without one",
            expected="a bundle of several products that tells them by itself (hvq, hgad)",
            next_step="remove judge.check_product, or use such a bundle",
        )


def tells_product(camera: CameraConfig, bundle: Bundle) -> bool:
    """Whether frames of the camera can be judged as `auto`: somebody says, or there is only one answer."""
    manifest = bundle.manifest
    in_data = camera.source.kind == "dataset"  # which says each image's product
    return in_data or len(manifest.classes) == 1 or manifest.outputs.logits is not None


def require_change(name: str, camera: CameraConfig, product: str, bundle: Bundle, program: str) -> None:
    """Refuse a product that a command is to set for a camera where it would change nothing, or not be judged.

    Raises:
        ProductError, ConfigError: see :func:`require_product`; or the source says each image's product itself.
    """
    require_product(name, camera, product, bundle, program)
    if camera.source.kind == "dataset" and product not in (AUTO, camera.product):
        raise ConfigError(
            f"{name} plays a data set, in which each image names its product",
            found=product,
            expected=AUTO,
            next_step="play the images with kind: folder to judge all of them as one product",
        )


def require_product(name: str, camera: CameraConfig, product: str, bundle: Bundle, program: str) -> None:
    """Refuse a product by command that no frame of the camera could be judged as, as a start does in a configuration.

    Raises:
        ProductError: the bundle does not know it.
        ConfigError: `auto`, and nothing tells the products apart, or what to judge of a picture before that is done.
    """
    if product != AUTO:
        bundle.class_index(product)
    elif not tells_product(camera, bundle):
        raise ConfigError(
            f"product auto of {name}: the bundle has no classifier",
            found=AUTO,
            expected=f"one of {', '.join(bundle.manifest.classes)}",
            next_step="name one of these in the command product",
        )
    require_crop(name, camera, product, bundle, program)

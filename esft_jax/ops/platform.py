"""Which platform a program is traced for."""

import jax


def target_platform() -> str:
    """Platform compiled for: `cpu`, `gpu` or `tpu`. Inside `shard_map` it is the mesh's, which may
    be one that this machine does not have (ahead-of-time compilation); else JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()

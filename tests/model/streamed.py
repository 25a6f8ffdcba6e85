"""A small model whose frozen experts are in the memory of the host, as a program for `COMPILE`."""

STREAMED = """
from flax import nnx
from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.model import Transformer
from esft_jax.model.params import expert_matrices_on_host
from esft_jax.sharding import make_mesh, param_shardings
from esft_jax.families import read_model_config
from esft_jax.topology import lowering_platform

LAYERS, EXPERTS, D, F = 6, 8, 256, 384
mesh = make_mesh(1, 1, list(mesh.devices.flat))
config = read_model_config({
    "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": D, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": F,
    "intermediate_size": F, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "tie_word_embeddings": False, "norm_topk_prob": True,
})
chosen = ExpertConfig({1: (3,), 4: (0, 5)})
graph = None

def parts():
    global graph
    model = Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, mesh=mesh)
    attach_tuned_experts(model, chosen)
    if SCHEME:
        from esft_jax.model.quantised import quantise_model
        from esft_jax.ops.quantisation import Quantisation
        quantise_model(model, Quantisation(experts=SCHEME), frozenset())
    model.remat = "full"
    graph, tuned, frozen = partition(model, chosen)
    return tuned, frozen

def place(tree, on_host=lambda param: False):
    shardings = param_shardings(tree, mesh, on_host)
    return jax.tree.map(lambda x, s: x.update(sharding=s), tree, shardings)

tuned, frozen = jax.eval_shape(parts)
tuned, frozen = place(tuned), place(frozen, expert_matrices_on_host(MEMORY))
tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

def loss(tuned, frozen, tokens):
    model = nnx.merge(graph, tuned, frozen)
    return model.hidden_states(tokens)[0].astype(jnp.float32).sum()

traced = jax.jit(jax.grad(loss)).trace(tuned, frozen, tokens)
platform = lowering_platform(list(mesh.devices.flat))
compiled = traced.lower(lowering_platforms=(platform,)).compile()
memory = compiled.memory_analysis()
params = [param for _, param in nnx.to_flat_state(frozen)]
moved = [param.get_value() for param in params if expert_matrices_on_host("host")(param)]
stacks = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(moved))
print(json.dumps({
    "arguments": memory.argument_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
    "host": memory.host_argument_size_in_bytes,
    "stacks": stacks,
    "layer": stacks // LAYERS,
}))
"""

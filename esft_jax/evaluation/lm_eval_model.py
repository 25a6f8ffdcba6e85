"""A model class for EleutherAI's lm-evaluation-harness, registered there as `esft_jax`."""

import json
from collections import defaultdict
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from esft_jax.checkpoint.load import local_folder
from esft_jax.checkpoint.manifest import RUN_DTYPES, run_chat_format
from esft_jax.config import QuantiseConfig
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.decode.generation import DecodingOptions, check_options, generate_tokens
from esft_jax.decode.likelihood import continuation_likelihoods
from esft_jax.errors import InputError
from esft_jax.evaluation.load import load_tuned
from esft_jax.files import checked, local_path
from esft_jax.processes import split_cpu
from esft_jax.progress import Progress
from esft_jax.sharding import make_mesh

# What tasks may set beside `until` and the number of tokens.
_GENERATION_KEYS = {"do_sample", "temperature", "top_p", "until", "max_gen_toks"}


@register_model("esft_jax")
class EsftJaxLM(TemplateLM):
    """Any model that `load_base` loads, alone or with an adapter, on the devices of one process.

    Texts become tokens as in the harness's own class for `transformers`, `HFLM`.

    Args:
        pretrained: Hugging Face folder, hub name, or folder written by `convert`.
        adapter: folder of an adapter; chats are rendered as in its run.
        dtype: of weights and computation, `bfloat16` or `float32`; default: see `load_tuned`.
        batch_size: requests computed together, over all devices.
        max_length: tokens of context and continuation; default: the model's limit.
        add_bos_token: BOS before contexts; default: as the tokenizer does by itself (key
            `add_bos_token` of `tokenizer_config.json`, else the post-processor of
            `tokenizer.json`).
        data, expert, cpu_devices: the mesh, as in a run's configuration.
        quantise_experts, quantise_rest, quantise_group_size: how the base's weights are held, as in
            a run's configuration.
        seed: of sampling.
        device, max_batch_size: ignored; the harness's command always sends them.

    Raises:
        InputError: an argument, the model or the adapter is wrong.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        data: int = -1,
        expert: int = 1,
        cpu_devices: int | None = None,
        quantise_experts: str = "none",
        quantise_rest: str = "none",
        quantise_group_size: int = QuantiseConfig.group_size,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise InputError(f"model_args: {sorted(unknown)[0]}: no argument of this model")
        if dtype not in (None, *RUN_DTYPES):
            raise InputError(f"model_args: dtype: {dtype!r}; expected bfloat16 or float32")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"batch_size: {batch_size!r}; expected a number of requests")
        quantise = {
            "experts": quantise_experts,
            "rest": quantise_rest,
            "group_size": quantise_group_size,
        }
        how = checked(QuantiseConfig, quantise, "model_args: quantise").chosen
        split_cpu(cpu_devices)
        pretrained = local_path(pretrained)
        adapter = None if adapter is None else local_path(adapter)
        folder = local_folder(pretrained)
        self._tokens = Tokenizer.load(folder, run_chat_format(adapter))
        mesh = make_mesh(data, expert)
        if jax.process_count() > 1:
            raise InputError("the harness runs in one process; expected no other ones")
        self._model = load_tuned(pretrained, adapter, dtype, mesh, how).model
        self._tokens.check_vocabulary(self._model.config.vocab_size)
        limit = self._model.config.max_positions
        if max_length is not None and not 1 < max_length <= limit:
            raise InputError(f"model_args: max_length: {max_length}; expected 2 to {limit}")
        self.max_length = max_length or limit
        self.max_gen_toks = 256  # where a task does not say; as HFLM
        self.batch_size, self._seed, self._name = int(batch_size), seed, pretrained
        default = self._tokens.begins_with_bos
        self._add_bos = default if add_bos_token is None else add_bos_token
        if self._add_bos and self._tokens.bos_id is None:
            raise InputError("model_args: add_bos_token: the tokenizer has no BOS")

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: BOS, or EOS where there is none."""
        return self._tokens.eos_id if self._tokens.bos_id is None else self._tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's cache of requests."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the chat template, if one is asked for."""
        return self._tokens.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat; without `add_generation_prompt` its last message can be continued."""
        messages: Any = chat_history
        text = self._tokens.render(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = str(chat_history[-1]["content"])
        return text[: text.rindex(begun) + len(begun)]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, after BOS if the model is used so and the text does not begin with it."""
        ids = self._tokens.encode(string)
        add_bos = self._add_bos if add_special_tokens is None else add_special_tokens
        bos = self._tokens.bos_id
        return ids if not add_bos or bos is None or ids[:1] == [bos] else [bos, *ids]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with Progress("log-likelihood", len(pairs), shown=not disable_tqdm) as bar:
            found = continuation_likelihoods(
                self._model,
                pairs,
                batch_size=self.batch_size,
                max_length=self.max_length,
                advance=bar.advance,
            )
        for (texts, *_), result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts; long ones in windows, each token predicted once."""
        owners: list[int] = []
        pairs: list[tuple[list[int], list[int]]] = []
        for number, request in enumerate(requests):
            tokens, prefix = self.tok_encode(request.args[0]), self.prefix_token_id
            windows = get_rolling_token_windows(
                # The prefix comes first in any case, and is not predicted.
                token_list=tokens[1:] if tokens[:1] == [prefix] else tokens,
                prefix_token=prefix,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                owners.append(number)
                pairs.append(make_disjoint_window(window))
        with Progress("log-likelihood", len(pairs), shown=not disable_tqdm) as bar:
            found = continuation_likelihoods(
                self._model, pairs, batch_size=self.batch_size, advance=bar.advance
            )
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, found, strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions, each up to the first of its stop sequences."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        wanted = {
            key: self._wanted(requests[numbers[0]].args[1]) for key, numbers in groups.items()
        }
        texts = [""] * len(requests)
        with Progress("generate", len(requests), shown=not disable_tqdm) as bar:
            for key, numbers in groups.items():
                contexts = [requests[number].args[0] for number in numbers]
                found = self._generate(contexts, wanted[key], bar)
                for number, text in zip(numbers, found, strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _wanted(self, given: dict[str, Any]) -> dict[str, Any]:
        """The options of a request, in the harness's one spelling, once they are known to do."""
        wanted: dict[str, Any] = {**normalize_gen_kwargs(given, self.max_gen_toks)}
        if unknown := sorted(wanted.keys() - _GENERATION_KEYS):
            known = ", ".join(sorted(_GENERATION_KEYS))
            raise InputError(f"generation_kwargs: {unknown[0]}: not supported; expected {known}")
        count = wanted["max_gen_toks"]
        if not 0 < count < self.max_length:
            raise InputError(
                f"generation_kwargs: max_gen_toks: {count}; expected at most "
                f"{self.max_length - 1}, one less than the model reads"
            )
        # As in `transformers`, where sampling without a temperature has 1.
        sampled = wanted["do_sample"]
        wanted["temperature"] = wanted.get("temperature", 1.0) if sampled else 0.0
        wanted["top_p"] = wanted.get("top_p", 1.0) if sampled else 1.0
        check_options(count, wanted["temperature"], wanted["top_p"], self.batch_size)
        return wanted

    def _generate(self, contexts: list[str], wanted: dict[str, Any], bar: Progress) -> list[str]:
        until, count = wanted["until"], wanted["max_gen_toks"]
        options: DecodingOptions = {
            "temperature": wanted["temperature"],
            "top_p": wanted["top_p"],
            "seed": self._seed,
            "batch_size": self.batch_size,
            "stop": lambda ids: any(text and text in self._tokens.decode(ids) for text in until),
            "advance": bar.advance,
        }

        def encode(context: str) -> list[int]:
            ids = self.tok_encode(context)[count - self.max_length :]
            return ids or [self.prefix_token_id]

        def finish(ids: list[int]) -> str:
            return postprocess_generated_text(self._tokens.decode(ids), until, None)

        new = generate_tokens(
            self._model,
            [encode(context) for context in contexts],
            stop_ids=self._tokens.stop_ids,
            max_new_tokens=count,
            **options,
        )
        return [finish(ids) for ids in new]

"""The reference: summed log-probs and gradients of a Hugging Face checkpoint, by transformers, one layer at a time.

    reference = Reference(hf, torch.float32, "cpu")
    sums_PM = reference.forward(pairs, indices, num_responses=2)
    for name, gradient in reference.gradients(slopes_PM): ...      # slopes: the derivative of the loss by each sum

Every sequence runs alone, without padding. Each layer is transformers' own code: its model without the other layers,
loaded when it is needed. So only one layer (or the embedding, or the output layer) is in memory, and the hidden states
between layers. The backward pass runs every layer again, from the last to the first.

Embedding, final norm, output layer and what a model does to the embeddings and the logits are those of a model without
layers. Its config has no `pad_token_id`: transformers gives that row of the embedding no gradient, even where the token
is text (an end of text that also serves as padding).

Shapes: n tokens of a sequence, H hidden size, V vocabulary, P pairs, M scored responses of a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from simpo_megatron.checkpoint.source import tensor_bytes
from simpo_megatron.data import Pairs
from simpo_megatron.models.dtypes import TORCH
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.weight_table import tensor_and_slice

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Reference:
    """One batch through a checkpoint.

    Args:
        hf: the checkpoint.
        dtype: of weights and activations; log-softmax and sums are at least fp32.
        device: where the layers run; hidden states are kept on the CPU.

    Attributes:
        sequences: of each sequence its ids and the position where the response starts.
        hidden: inputs of each layer and then the output of the last one, [1, n, H] for each sequence.
    """

    def __init__(self, hf: HFCheckpoint, dtype: torch.dtype, device: torch.device | str) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.hf, self.dtype, self.device = hf, dtype, torch.device(device)
        self.config = transformers.AutoConfig.from_pretrained(hf.path, local_files_only=True)
        with torch.device("meta"):
            self.model_class: Any = type(transformers.AutoModelForCausalLM.from_config(self._small_config()))
        self.sequences: list[tuple[Tensor, int]] = []
        self.hidden: list[list[Tensor]] = []

    def embed(self, ids: Tensor) -> Tensor:
        """The embedding of ids [n]: [1, n, H]."""
        return self._embedding()(ids.to(self.device))[None]

    def layer(self, layer: int, hidden: Tensor) -> Tensor:
        """The output [1, n, H] of a layer for hidden states [1, n, H]."""
        return self._run(self._layer(layer), hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [1, n, V] of the last hidden states [1, n, H]."""
        return self._head()(inputs_embeds=hidden.to(self.device), use_cache=False).logits

    def forward(self, pairs: Pairs, indices: list[int], num_responses: int) -> Tensor:
        """Scores pairs, and keeps the hidden states that `gradients` needs.

        Args:
            pairs: of the data.
            indices: of the pairs.
            num_responses: M: 2, or 1 for the chosen response alone.

        Returns:
            [P, M] float64: the summed log-probs of the responses, chosen first.
        """
        self.sequences = [
            (torch.tensor([*prompt.tolist(), *response.tolist()]), len(prompt))
            for prompt, *responses in map(pairs.pair, indices)
            for response in responses[:num_responses]
        ]
        with torch.no_grad():
            embedding = self._embedding()
            self.hidden = [[embedding(ids.to(self.device))[None].cpu() for ids, _ in self.sequences]]
            del embedding
            for layer in range(self.hf.architecture.num_layers):
                model = self._layer(layer)
                self.hidden.append([self._run(model, hidden).cpu() for hidden in self.hidden[-1]])
            head = self._head()
            sums = [self._sum(head, i, hidden) for i, hidden in enumerate(self.hidden[-1])]
        return torch.stack(sums).view(-1, num_responses).double().cpu()

    def gradients(self, of_sums_PM: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields name and gradient of every tensor of the checkpoint, the output layer first. Call it after `forward`.

        Args:
            of_sums_PM: the derivative of the loss by each sum that `forward` returned.
        """
        scales = of_sums_PM.flatten().tolist()
        head = self._head()
        total = _Total({NORM: head.model.norm.weight, HEAD: head.lm_head.weight})
        above = []
        for i, hidden in enumerate(self.hidden.pop()):
            given = hidden.to(self.device).requires_grad_()
            (scales[i] * self._sum(head, i, given)).backward()
            above.append(_gradient(given))
            total.add()
        of_head = total.sums.pop(HEAD)
        yield from total.sums.items()
        if not self.hf.architecture.tied:
            yield HEAD, of_head
        for layer in reversed(range(self.hf.architecture.num_layers)):
            yield from self._layer_gradients(layer, above)
        embedding = self._embedding()
        of_embedding = _Total({EMBEDDING: embedding.weight})
        for (ids, _), gradient in zip(self.sequences, above, strict=True):
            embedding(ids.to(self.device)).backward(gradient[0])
            of_embedding.add()
        yield EMBEDDING, of_embedding.sums[EMBEDDING] + (of_head if self.hf.architecture.tied else 0)

    def _layer_gradients(self, layer: int, above: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields the gradients of a layer's tensors; in `above`, its inputs' gradients replace its outputs'."""
        model = self._layer(layer)
        total = _Total(dict(model.model.layers[0].named_parameters(prefix="model.layers.0")))
        for i, hidden in enumerate(self.hidden.pop()):
            given = hidden.to(self.device).requires_grad_()
            self._run(model, given).backward(above[i])
            above[i] = _gradient(given)
            total.add()
        for found, gradient in revert_weight_conversion(model, total.sums).items():
            name = found.replace("layers.0.", f"layers.{layer}.", 1)
            if name in self.hf.tensors:
                yield name, gradient
            else:  # it holds all experts
                yield from ((f"{name}[{index}]", of_expert) for index, of_expert in enumerate(gradient))

    def _small_config(self) -> Any:
        """The config of the model, with a vocabulary of one token, so that a layer comes without large tensors."""
        config = type(self.config).from_dict(self.config.to_dict())
        config.vocab_size, config.tie_word_embeddings, config.pad_token_id = 1, False, None
        return config

    def _tensor(self, name: str) -> Tensor:
        tensors = [self.hf.tensors[name]] if name in self.hf.tensors else []
        while f"{name}[{len(tensors)}]" in self.hf.tensors:
            tensors.append(self.hf.tensors[f"{name}[{len(tensors)}]"])
        tensor = tensors[0]
        if tensor.file.suffix == ".safetensors":
            with safe_open(str(tensor.file), framework="pt", device="cpu") as file:
                return file.get_tensor(name).to(self.device, self.dtype)
        # A .bin file: its bytes are read, and nothing in it is unpickled.
        data = np.fromfile(tensor.file, np.uint8, sum(map(tensor_bytes, tensors)), offset=tensor.start)
        shape = tensor.shape if name in self.hf.tensors else (len(tensors), *tensor.shape)
        return torch.from_numpy(data).view(TORCH[tensor.dtype]).view(shape).to(self.device, self.dtype)

    def _model(self, layers: range, state: dict[str, Tensor]) -> Any:
        """The model without its other layers, with these tensors, in which the first of the layers is the layer 0.

        All layers are built, on no device, because transformers makes each for its index.
        """

        class Part(self.model_class):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.model.layers = self.model.layers[layers.start : layers.stop]
                config.num_hidden_layers = len(layers)
                if getattr(config, "layer_types", None):
                    config.layer_types = config.layer_types[layers.start : layers.stop]

        model = Part.from_pretrained(None, config=self._small_config(), state_dict=state, dtype=self.dtype)
        return model.to(self.device).eval()  # without dropout, as in training

    def _layer(self, layer: int) -> Any:
        """A causal model of this one layer, with a final norm that does nothing."""
        prefix = f"model.layers.{layer}."
        state = {
            name.replace(prefix, "model.layers.0.", 1): self._tensor(name)
            for name in dict.fromkeys(tensor_and_slice(name)[0] for name in self.hf.tensors if name.startswith(prefix))
        }
        model = self._model(range(layer, layer + 1), state)
        model.model.norm = torch.nn.Identity()
        return model

    def _embedding(self) -> Any:
        """The embedding, and what the model multiplies it by."""
        embedding = self._model(range(0), {}).get_input_embeddings()
        embedding.weight = torch.nn.Parameter(self._tensor(EMBEDDING))
        return embedding

    def _head(self) -> Any:
        """A causal model without layers: the final norm, the output layer, and what the model does to the logits."""
        model = self._model(range(0), {NORM: self._tensor(NORM)})
        model.lm_head.weight = torch.nn.Parameter(self._tensor(EMBEDDING if self.hf.architecture.tied else HEAD))
        return model

    def _run(self, model: Any, hidden: Tensor) -> Tensor:
        return model.model(inputs_embeds=hidden.to(self.device), use_cache=False).last_hidden_state

    def _sum(self, head: Any, i: int, hidden: Tensor) -> Tensor:
        """Summed log-probs of the response of sequence i from its last hidden states [1, n, H]."""
        ids, start = self.sequences[i]
        ids = ids.to(self.device)
        logits = head(inputs_embeds=hidden.to(self.device)[:, start - 1 : -1], use_cache=False).logits[0]
        return -F.cross_entropy(logits.float(), ids[start:], reduction="sum")


class _Total:
    """Adds up the gradients of the sequences in fp32, for parameters of any dtype.

    Attributes:
        sums: the gradients so far, by name.
    """

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters
        self.sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}

    def add(self) -> None:
        """Adds the gradients that the parameters hold now, and clears them."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:  # an expert that got no token
                self.sums[name] += parameter.grad
                parameter.grad = None


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "no backward pass has reached this tensor"
    return tensor.grad

"""A model that is changed while it is kept: what was kept of the old one is never served, nor is
what is computed by the new one kept under the old one's name."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from tierloom.adapters.transformers.cached_model import Abandoned
from tierloom.adapters.transformers.model import with_cache
from tierloom.adapters.transformers.model_state import SAMPLES, State, rest_id, sample_of
from tierloom.stages.errors import InputError, TierloomError

from .conftest import greedy, spread, tiny_llama, tokens
from .test_kept import say

if TYPE_CHECKING:
    from collections.abc import Callable


class Doubled(torch.nn.Module):
    """A layer in another one's place, as adapters are put there."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.factor, self.on = inner, {"default": 2.0}, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (self.factor["default"] if self.on else 1.0)


def layer(model: Any) -> Any:
    return model.model.layers[0]


def trained(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(tokens(8), labels=tokens(8)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def loaded(model: Any) -> None:
    model.load_state_dict(tiny_llama(seed=9, num_hidden_layers=2).state_dict())


def merged(model: Any) -> None:
    """As adapters are merged: it moves neither version nor pointer."""
    before = layer(model).self_attn.v_proj.weight
    was = before.data_ptr(), before._version
    before.data += torch.randn_like(before) * 0.3
    assert (before.data_ptr(), before._version) == was


def one_value(model: Any) -> None:
    with torch.no_grad():
        layer(model).mlp.up_proj.weight[7, 11] += 40


def replaced_parameter(model: Any) -> None:
    old = layer(model).self_attn.k_proj.weight
    layer(model).self_attn.k_proj.weight = torch.nn.Parameter(old.detach() * 1.5)


def replaced_data(model: Any) -> None:
    p = layer(model).self_attn.k_proj.weight
    p.data = p.data * 1.5


def replaced_module(model: Any) -> None:
    layer(model).mlp = Doubled(layer(model).mlp).eval()


def activation(model: Any) -> None:
    layer(model).mlp.act_fn = torch.nn.GELU().eval()


def buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 3


def number(model: Any) -> None:
    layer(model).self_attn.scaling *= 4


def config(model: Any) -> None:
    """Read at every call."""
    model.config._attn_implementation = "eager"


def own_forward(model: Any) -> None:
    inner = layer(model).mlp
    inner.forward = Doubled(copy.deepcopy(inner)).forward


NAMED = """
import importlib.util, sys
from tierloom.adapters.transformers.model_state import rest_id
spec = importlib.util.spec_from_file_location("made", sys.argv[1])
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
print(rest_id(made.spread(made.tiny_llama(num_hidden_layers=2))))
"""

CHANGES = [
    trained, loaded, merged, one_value, replaced_parameter, replaced_data, replaced_module,
    activation, buffer, number, config,
]  # fmt: skip


@pytest.fixture
def model() -> Any:
    return spread(tiny_llama(num_hidden_layers=2))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_another_one(
    keep: Any, model: Any, change: Callable[[Any], None]
) -> None:
    was = greedy(model, tokens(300)).tolist()
    kept = keep(model)
    say(kept, tokens(300))
    assert say(kept, tokens(300)) == 288
    change(model)
    if change is not config:
        assert greedy(model, tokens(300)).tolist() != was, "the change changes nothing"
    assert say(kept, tokens(300)) == 0
    assert say(kept, tokens(300)) == 288
    kept.close()
    again = keep(model)
    assert say(again, tokens(300)) == 288, "another process has another name for it"
    again.close()
    assert say(keep(spread(tiny_llama(num_hidden_layers=2))), tokens(300)) == 288


def test_another_dtype_has_another_layout(keep: Any, model: Any) -> None:
    kept = keep(model)
    say(kept, tokens(300))
    model.bfloat16()
    assert say(kept, tokens(300)) == 0
    assert say(kept, tokens(300)) == 288
    assert kept.shape.dtype is torch.bfloat16


def test_an_adapter_that_is_switched_off_and_on(keep: Any, model: Any) -> None:
    layer(model).mlp = adapter = Doubled(layer(model).mlp).eval()
    kept = keep(model)
    say(kept, tokens(300))
    for change in ({"on": False}, {"on": True, "factor": {"default": 3.0}}):
        vars(adapter).update(change)
        assert say(kept, tokens(300)) == 0
    adapter.factor["default"] = 2.0
    assert say(kept, tokens(300)) == 288, "it is what it was"


def test_nothing_new_where_nothing_changed(keep: Any, model: Any) -> None:
    kept = keep(model)
    say(kept, tokens(300))
    pipe = kept.pipe
    with torch.no_grad():
        model.lm_head.weight.mul_(1.0)  # counted by torch, and the same
    model.config.use_cache = False
    assert say(kept, tokens(300)) == 288
    assert kept.pipe is pipe


@pytest.mark.parametrize("change", [*CHANGES, own_forward])
def test_who_named_the_weights_is_told(
    keep: Any, model: Any, change: Callable[[Any], None]
) -> None:
    kept = keep(model, weights="v1")
    say(kept, tokens(300))
    change(model)
    for call in (kept.generate, kept.cache):
        with pytest.raises(InputError, match="weights='v1' identifies it as it was"):
            call(tokens(300))


def test_training_mode_of_a_part(keep: Any, model: Any) -> None:
    kept = keep(model)
    say(kept, tokens(300))
    layer(model).mlp.train()
    with pytest.raises(InputError, match=r"layers\.0\.mlp is in training mode"):
        kept.generate(tokens(300))
    with pytest.raises(InputError, match=r"layers\.0\.mlp is in training mode"):
        keep(model)
    layer(model).mlp.eval()
    assert say(kept, tokens(300)) == 288


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_cannot_be_named(keep: Any, model: Any, hook: str) -> None:
    kept = keep(model)
    say(kept, tokens(300))
    handle = getattr(layer(model), hook)(lambda *_: None)
    with pytest.raises(InputError, match=r"layers\.0\._forward.*hooks is the function .*weights="):
        kept.generate(tokens(300))
    handle.remove()
    assert say(kept, tokens(300)) == 288
    own_forward(model)
    with pytest.raises(InputError, match=r"mlp\.forward .*weights="):
        kept.generate(tokens(300))


def test_a_class_whose_forward_is_patched(
    keep: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep(model)
    say(kept, tokens(300))
    with monkeypatch.context() as patch:
        patch.setattr(type(layer(model).mlp), "forward", lambda self, x: self.down_proj(
            self.up_proj(x)))  # fmt: skip
        assert say(kept, tokens(300)) == 0
        assert say(kept, tokens(300)) == 288
    assert say(kept, tokens(300)) == 288


def test_another_process_has_the_same_name_for_it(model: Any) -> None:
    here = Path(__file__).resolve()
    env = os.environ | {"PYTHONPATH": str(here.parents[3] / "src"), "PYTHONHASHSEED": "1",
                        "PYTHONSAFEPATH": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", NAMED, str(here.parent / "conftest.py")], env=env, check=True,
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.strip() == rest_id(model)


def test_hooks_of_accelerate_move_tensors_only(keep: Any, model: Any) -> None:
    for part in layer(model).children():
        add_hook_to_module(part, AlignDevicesHook("cpu"))
    kept = keep(model)
    say(kept, tokens(300))
    assert say(kept, tokens(300)) == 288


def test_a_compiled_model_is_kept_as_what_it_was(keep: Any, model: Any) -> None:
    first = keep(model)
    say(first, tokens(300))
    first.close()
    assert say(keep(torch.compile(model, backend="eager")), tokens(300)) == 288


def test_weights_made_in_inference_mode(keep: Any) -> None:
    with torch.inference_mode():
        model = spread(tiny_llama(num_hidden_layers=2))
        with pytest.raises(InputError, match=r"made in inference mode.*weights="):
            keep(model)
        kept = keep(model, weights="v1")
        say(kept, tokens(300))
        assert say(kept, tokens(300)) == 288
        layer(model).self_attn.v_proj.weight.mul_(1.5)
        with pytest.raises(InputError, match=r"v_proj.weight of the model changed"):
            kept.generate(tokens(300))


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_tensor_of_a_quantized_model(keep: Any, model: Any) -> None:
    """Its weights are packed where neither torch nor we can see them."""
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}).eval()
    with pytest.raises(TierloomError, match="weights="):
        keep(quantized)


def test_it_changes_between_the_plan_and_the_forward(keep: Any, model: Any) -> None:
    kept = keep(model)
    say(kept, tokens(300))
    cache = kept.cache(tokens(300))
    assert cache.get_seq_length() == 288
    merged(model)
    with torch.no_grad(), pytest.raises(Abandoned, match=r"v_proj\.weight changed"):
        model(tokens(300)[:, 288:], **with_cache(model, cache))
    assert say(kept, tokens(300)) == 0


def test_it_changes_before_what_it_computed_is_stored(keep: Any, model: Any) -> None:
    kept = keep(model)
    cache = kept.cache(tokens(300))
    assert cache.get_seq_length() == 0
    merged(model)
    with torch.no_grad():
        model(tokens(300), **with_cache(model, cache))
    assert cache.storing.wait().tokens == 0
    kept.close()
    assert say(keep(spread(tiny_llama(num_hidden_layers=2))), tokens(300)) == 0


def test_it_changes_while_it_answers(keep: Any, model: Any) -> None:
    """The answer's KV is of both, and kept as neither's."""

    class Change:
        def put(self, value: torch.Tensor) -> None:
            if value.numel() == 1:
                merged(model)

        def end(self) -> None:
            pass

    kept = keep(model, store_decode=True)
    out = kept.generate(tokens(300), max_new_tokens=40, do_sample=False, streamer=Change())
    kept.flush()
    assert len(kept.last.storing) == 1
    assert say(kept, out) == 0


def test_the_same_state_in_another_model_of_the_same_making(model: Any) -> None:
    twin = spread(tiny_llama(num_hidden_layers=2))
    assert rest_id(model) == rest_id(twin)
    greedy(twin, tokens(40), output_attentions=True, return_dict_in_generate=True)
    assert rest_id(model) == rest_id(twin), "transformers' own hooks only look on"
    assert State(model).differs(State(model)) is None
    large = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert rest_id(model) != rest_id(large)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool,
                                   torch.complex64, torch.int64])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3,), (512, 256), (7, 5, 3)])
def test_a_sample_is_of_all_rows_and_columns(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n = int(torch.Size(shape).numel())
    t = torch.arange(n).reshape(shape).to(dtype)
    for one in (t, t.mT if t.dim() > 1 else t):
        sample = sample_of(one)
        assert (sample.numel() > 0) == (n > 0)
        assert sample.numel() <= 2 * SAMPLES
        if dtype is torch.int64 and n > 1000:
            rows, columns = torch.unravel_index(sample, shape)
            assert len(set(rows.tolist())) > 60
            assert len(set(columns.tolist())) > 60


def test_a_module_that_knows_what_it_is_part_of(keep: Any, model: Any) -> None:
    layer(model).up = [model]
    layer(model).aside = [Doubled(torch.nn.Linear(2, 2)).eval()]
    kept = keep(model)
    say(kept, tokens(300))
    assert say(kept, tokens(300)) == 288
    layer(model).aside[0].inner.weight.data += 1
    assert say(kept, tokens(300)) == 0


def test_a_changed_tensor_of_a_large_model_is_hashed_whole(
    keep: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its strips alone would not tell."""
    from tierloom.adapters.transformers import model as of

    monkeypatch.setattr(of, "WHOLE", 0)
    monkeypatch.setattr(of, "STRIP", 64)
    monkeypatch.setattr(of, "STRIPS", 2)
    kept = keep(model)
    say(kept, tokens(300))
    before = of.fingerprint(model)
    one_value(model)
    assert of.fingerprint(model) == before
    assert say(kept, tokens(300)) == 0
    assert say(kept, tokens(300)) == 288

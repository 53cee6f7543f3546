"""The text models: evidence adds up, padding is invisible, what is saved is what was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from nin_text import PRESETS, NiNTextConfig, NiNTextForSequenceClassification, NiNTextModel
from nin_text.modeling import classification_loss

VOCABULARY = 50
# Beside the presets: every option that a preset leaves out.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in PRESETS},
    "inception": {
        "block_channels": [[24, 16, 24]],
        "kernel_sizes": [[1, 3, 5]],
        "embedding_size": 24,
    },
    "dilated": {
        "block_channels": [[24, 24], [24, 24]],
        "kernel_sizes": [[3], [5]],
        "dilations": [1, 4],
        "residual": True,
        "norm": True,
        "embedding_size": 24,
        "hidden_act": "silu",
    },
    "pooled and dilated": {
        "block_channels": [[24], [24, 16], [16, 8]],
        "kernel_sizes": [[4], [3], [3]],
        "dilations": [2, 1, 3],
        "pool": [True, True, False],
        "embedding_size": 24,
        "hidden_act": "hardswish",
    },
    "n-grams": {
        "block_channels": [[24], [24, 16]],
        "kernel_sizes": [[3], [3]],
        "pool": [True, False],
        "embedding_size": 24,
        "ngram_size": 3,
        "ngram_buckets": 512,
    },
}

STILL = {"hidden_dropout": 0.0, "embedding_dropout": 0.0, "word_dropout": 0.0}


def make_config(name: str, **overrides: Any) -> NiNTextConfig:
    options = {"vocab_size": VOCABULARY, "num_labels": 3, **VARIANTS[name], **overrides}
    return (
        NiNTextConfig.from_preset(name, **options) if name in PRESETS else NiNTextConfig(**options)
    )


def make_model(name: str, **overrides: Any) -> NiNTextForSequenceClassification:
    torch.manual_seed(0)
    model = NiNTextForSequenceClassification(make_config(name, **overrides)).eval()
    with torch.no_grad():  # attention that is far from uniform, a bias that is not zero
        model.classifier.bias.normal_()
        if model.nin.attention is not None:
            model.nin.attention.weight.mul_(5)
        if model.ngrams is not None:  # which is zero until it is fitted
            model.ngrams.weight.normal_()
            model.ngrams.bias.normal_()
    return model


def random_texts(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]


def pad(texts: list[torch.Tensor], *, left: bool = False, extra: int = 0) -> dict[str, Any]:
    width = max(len(text) for text in texts) + extra
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(0, len(text))
        ids[i, place], mask[i, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("name", VARIANTS)
def test_evidence_sums_to_the_logits(name: str, pooling: str) -> None:
    model = make_model(name, pooling=pooling)
    output = model(**pad(random_texts([12, 1, 5, 33])), output_evidence=True)
    assert output.evidence.shape == (4, 33, 3)
    assert torch.allclose(output.evidence.sum(dim=1), output.logits, atol=1e-4)
    assert not output.evidence[1, 1:].any()


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("name", VARIANTS)
def test_padding_is_invisible(name: str, pooling: str) -> None:
    model = make_model(name, pooling=pooling)
    texts = random_texts([12, 1, 5, 33, 2])
    alone = torch.cat([model(text[None]).logits for text in texts])
    for left in (False, True):
        for extra in (0, 7):
            batch = model(**pad(texts, left=left, extra=extra)).logits
            assert torch.allclose(alone, batch, atol=1e-5), (left, extra)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from(sorted(VARIANTS)))
def test_the_batch_that_a_text_is_in_never_matters(lengths: list[int], name: str) -> None:
    model = make_model(name)
    texts = random_texts(lengths)
    output = model(**pad(texts, extra=1), output_evidence=True)
    for i, text in enumerate(texts):
        alone = model(**pad([text], extra=1), output_evidence=True)
        assert torch.allclose(output.logits[i], alone.logits[0], atol=1e-5)
        assert torch.allclose(
            output.evidence[i, : len(text)], alone.evidence[0, : len(text)], atol=1e-5
        )


def test_a_text_without_tokens_has_equal_classes_and_finite_gradients() -> None:
    model = make_model("nin-text-base").train()
    output = model(**pad(random_texts([0, 4]), extra=1), labels=torch.tensor([0, 1]))
    assert output.logits[0].tolist() == [0, 0, 0]
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_encoder_returns_hidden_states_whose_weighted_sum_is_the_pooled_text(name: str) -> None:
    model = make_model(name).nin
    batch = pad(random_texts([12, 5]))
    output = model(**batch)
    channels = model.config.hidden_size
    assert output.last_hidden_state.shape == (2, 12, channels)
    assert output.pooler_output.shape == (2, channels)
    assert not output.last_hidden_state[1, 5:].any()
    weighted = (output.last_hidden_state * output.pooling_weights[..., None]).sum(dim=1)
    assert torch.allclose(weighted, output.pooler_output, atol=1e-5)
    assert torch.equal(model(**batch, return_dict=False)[0], output.last_hidden_state)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = make_model(name).train()
    texts = random_texts([30] * 8)
    model(**pad(texts), labels=torch.arange(8) % 3).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("name", VARIANTS)
def test_every_preset_can_learn_32_random_texts_by_heart(name: str) -> None:
    torch.manual_seed(0)
    # Without dropout: the question is whether the network and its gradients can do it at all.
    model = NiNTextForSequenceClassification(make_config(name, **STILL))
    batch, labels = pad(random_texts([8] * 32, seed=5)), torch.arange(32) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    assert (model(**batch).logits.argmax(dim=1) == labels).all()


@pytest.mark.parametrize("name", PRESETS)
def test_initial_weights_keep_the_signal(name: str) -> None:
    """transformers' N(0, 0.02) would make a deep ReLU stack constant (spread 1e-11)."""
    torch.manual_seed(0)
    model = NiNTextForSequenceClassification(make_config(name))
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d)) and module.weight.numel() > 2000:
            fan_in = module.weight[0].numel()
            expected = (2 / fan_in) ** 0.5
            if any(module is block.pointwise[-1] for block in model.nin.blocks if block.residual):
                expected /= len(model.nin.blocks) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.1)
    pooled = model.eval().nin(**pad(random_texts([30] * 64))).pooler_output.detach()
    spread = pooled.std(dim=0).square().mean() / pooled.square().mean()
    assert float(spread.sqrt()) > 0.05, "all texts look alike"


def test_a_network_may_have_no_classes() -> None:
    config = NiNTextConfig.from_preset("nin-text-small", num_labels=0)
    model = NiNTextForSequenceClassification(config)
    assert model(**pad(random_texts([3, 5]))).logits.shape == (2, 0)


def test_a_loss_of_what_speaks_for_and_against_each_class() -> None:
    """Once each it is that of zeros and ones; it adds up, as of so many texts."""
    config = make_config("n-grams", problem_type="multi_label_classification", num_labels=3)
    logits, labels = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    sides = torch.stack([labels, 1 - labels], dim=1)  # (B, 2, K)
    plain = classification_loss(logits, labels, config)
    assert torch.allclose(classification_loss(logits, sides, config), plain)
    weights = torch.tensor([2.0, 1, 1, 0])
    twice = torch.tensor([0, 0, 1, 2])  # the texts that these stand for
    weighed = classification_loss(logits, sides * weights[:, None, None], config)
    assert torch.allclose(weighed, classification_loss(logits[twice], labels[twice], config))


def test_ids_of_32_bits_are_as_good_as_of_64() -> None:
    """The hashes of n-grams overflow in 32 bits, and embeddings take either."""
    model = NiNTextForSequenceClassification(make_config("n-grams")).eval()
    torch.nn.init.normal_(model.ngrams.weight)
    ids = torch.randint(1, VOCABULARY, (3, 20))
    with torch.inference_mode():
        assert torch.equal(model(ids.int()).logits, model(ids).logits)


def test_the_padding_row_stays_zero_after_construction() -> None:
    assert not make_model("nin-text-small").nin.embeddings.weight[0].any()


RELOAD = """
import json, sys, torch, nin_text
from transformers import AutoModelForSequenceClassification
torch.manual_seed(12345)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
logits, names = model(ids).logits.tolist(), dict(model.config.id2label)
print(json.dumps([type(model).__name__, logits, names[1]]))
"""


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_model_is_the_same_under_another_seed(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    ids = torch.stack(random_texts([9, 9]))
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*") if p.suffix != ".json"] == ["model.safetensors"]
    torch.manual_seed(999)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_saved_model_is_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    names = {0: "bad", 1: "good", 2: "so-so"}
    model = make_model("nin-text-base", id2label=names, label2id={v: k for k, v in names.items()})
    ids = torch.stack(random_texts([9, 9]))
    model.save_pretrained(tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path), json.dumps(ids.tolist())],
        capture_output=True,
        text=True,
        check=True,
    )
    kind, logits, label = json.loads(process.stdout.splitlines()[-1])
    assert kind == "NiNTextForSequenceClassification"
    assert torch.tensor(logits).allclose(model(ids).logits, atol=1e-6)
    assert label == "good"


def test_auto_classes_know_the_models(tmp_path: Path) -> None:
    make_model("nin-text-small").save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), NiNTextConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), NiNTextModel)


def test_the_encoder_of_a_classifier_loads_with_equal_weights(tmp_path: Path) -> None:
    model = make_model("nin-text-base")
    model.save_pretrained(tmp_path)
    encoder = NiNTextModel.from_pretrained(tmp_path).eval()
    batch = pad(random_texts([5, 8]))
    expected = model.nin.state_dict()
    assert encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[k]) for k, value in encoder.state_dict().items())
    # Sums depend, in their last bit, on where in memory the weights lie.
    outputs = encoder(**batch).pooler_output, model.nin(**batch).pooler_output
    torch.testing.assert_close(*outputs)


# ---- loss --------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_cross_entropy() -> None:
    model = make_model("nin-text-small")
    batch, labels = pad(random_texts([4, 9, 2])), torch.tensor([0, 2, 1])
    output = model(**batch, labels=labels)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))


def test_a_class_weight_multiplies_the_loss_of_its_examples() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 2])
    config = make_config("nin-text-small", class_weights=[1.0, 3.0, 0.0])
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (each * torch.tensor([1.0, 3.0, 3.0, 0.0])).sum() / 4
    assert torch.allclose(classification_loss(logits, labels, config), expected)


def test_multi_label_is_a_sigmoid_for_each_class() -> None:
    model = make_model(
        "nin-text-small",
        problem_type="multi_label_classification",
        class_weights=[1.0, 2.0, 1.0],
    )
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    output = model(**pad(random_texts([4, 9])), labels=labels)
    p = output.logits.sigmoid()
    each = -(labels * p.log() + (1 - labels) * (1 - p).log()) * torch.tensor([1.0, 2.0, 1.0])
    assert torch.allclose(output.loss, each.mean(), atol=1e-6)


def test_label_smoothing_is_torchs() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 2])
    config = make_config("nin-text-small", label_smoothing=0.1)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(classification_loss(logits, labels, config), expected)


def test_the_loss_of_parts_divided_by_the_whole_sums_to_the_loss_of_the_whole() -> None:
    """What gradient accumulation relies on: the parts are of unequal size."""
    model = make_model("nin-text-small")
    texts, labels = random_texts([4, 9, 2, 7, 5]), torch.tensor([0, 2, 1, 1, 0])
    whole = model(**pad(texts), labels=labels).loss
    parts = [
        model(**pad(texts[a:b]), labels=labels[a:b], num_items_in_batch=5).loss
        for a, b in ((0, 1), (1, 5))
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-6)


def test_probabilities_as_labels() -> None:
    """One-hot probabilities are class indices; accumulated parts sum to the whole here, too."""
    model = make_model("nin-text-small")
    texts, labels = random_texts([4, 9, 2]), torch.tensor([0, 2, 1])
    certain = torch.eye(3)[labels]
    expected = model(**pad(texts), labels=labels).loss
    assert torch.allclose(model(**pad(texts), labels=certain).loss, expected)
    soft = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.1, 0.9], [1.0, 0.0, 0.0]])
    output = model(**pad(texts), labels=soft)
    assert torch.allclose(output.loss, -(soft * output.logits.log_softmax(1)).sum(1).mean())
    parts = [
        model(**pad(texts[a:b]), labels=soft[a:b], num_items_in_batch=soft.numel()).loss
        for a, b in ((0, 1), (1, 3))
    ]
    assert torch.allclose(sum(parts), output.loss, atol=1e-6)


def test_ngrams_are_left_out_of_training_and_rescaled_with_the_network() -> None:
    """In training mode the logits are those of the network alone."""
    model, batch = make_model("n-grams"), pad(random_texts([4, 9]))
    network, both = model.train()(**batch).logits, model.eval()(**batch).logits
    assert not torch.allclose(network, both, atol=0.1)
    model.rescale(0.5, 2.0)
    expected = network / 2 + 2 * (both - network)
    assert torch.allclose(model(**batch).logits, expected, atol=1e-4)


# ---- configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pooling": "max"}, "pooling"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"vocab_size": 0}, "positive"),
        ({"ngram_buckets": 0}, "positive"),
        ({"ngram_smoothing": 0.0}, "ngram_smoothing must be positive"),
        ({"ngram_smoothing": float("nan")}, "ngram_smoothing must be positive"),
        ({"ngram_size": -1}, "ngram_size must not be negative"),
        ({"kernel_sizes": [[3], [3]]}, "kernel_sizes has 2 entries for 1 blocks"),
        ({"block_channels": [[]]}, "at least one"),
        ({"block_channels": [], "kernel_sizes": []}, "at least one block"),
        ({"kernel_sizes": [[0]]}, "positive"),
        ({"word_dropout": 1.0}, "word_dropout"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_configuration_that_no_network_can_have_is_refused(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        NiNTextConfig(**{"block_channels": [[8, 8]], "kernel_sizes": [[3]], **wrong})


def test_unequal_residual_channels_and_class_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="as many channels"):
        NiNTextModel(NiNTextConfig(block_channels=[[8, 12]], embedding_size=8, residual=True))
    with pytest.raises(ValueError, match="2 class weights for 3 labels"):
        make_model("nin-text-small", class_weights=[1.0, 2.0])


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="nin-text-base"):
        NiNTextConfig.from_preset("nin-text-huge")


def test_a_configuration_survives_saving(tmp_path: Path) -> None:
    config = make_config("pooled and dilated", class_weights=[1.0, 2.0, 3.0])
    config.save_pretrained(tmp_path)
    assert NiNTextConfig.from_pretrained(tmp_path).to_dict() == {
        **config.to_dict(),
        "transformers_version": NiNTextConfig.from_pretrained(tmp_path).transformers_version,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["nin-text-base", "pooled and dilated"])
def test_weights_of_other_types_answer_nearly_alike(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, **STILL, ngram_size=2, ngram_buckets=64)
    model.ngrams.weight.normal_(std=0.1)
    batch = pad(random_texts([5, 1, 30]))
    with torch.no_grad():
        expected = model(**batch, output_evidence=True)
        output = model.to(dtype)(**batch, output_evidence=True)
    logits = output.logits.float()
    torch.testing.assert_close(logits, expected.logits, atol=0.05, rtol=0.05)
    # The sum of the n-grams is rounded to the type of their weights.
    torch.testing.assert_close(output.evidence.sum(dim=1).float(), logits, atol=0.01, rtol=0.01)


def test_a_single_label_is_refused_in_training() -> None:
    model = make_model("nin-text-small", num_labels=1)
    with pytest.raises(ValueError, match="num_labels=1 is regression"):
        model(**pad(random_texts([3])), labels=torch.tensor([0.5]))

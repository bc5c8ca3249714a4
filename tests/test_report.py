"""Tables, verdicts, claims and the page, on ledgers whose numbers are made up."""
import re
from io import StringIO
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from temp_nce.lab.experiment import Ledger, Spec, load_spec
from temp_nce.lab.report import (by_temperature, claims, comparison, curves_figure, geometry_figure, order_claim, overview,
                             report, results, sensitivity_figure, shown_scales, spread_claim, strategy_claim, summary,
                             text_report, text_table, tsne_figure, verdict)

SPEC = '''
title: Made up <script>alert(1)</script>
about: "None of this was measured & nothing <i>means</i> anything."
source: {paper: "Nobody \\"1900\\"", table: Table 0, url: "https://example.org/?a=1&b=2"}
notebook: madeup.ipynb
fixed: {lr: 1e-3}
grid:
  temperature: [0.1, 0.25, 0.5, 1, free]
  seed: [0, 1, 2]
scales:
  smoke: {grid: {temperature: [0.5], seed: [0]}}
  quick: {about: short, parameters: {epochs: 12}}
  paper: {parameters: {epochs: 800}}
metrics:
  best: {title: "top-1, best epoch", percent: true}
  last: {title: "top-1, last epoch", percent: true}
  uniformity: {better: low}
  tolerance: {}
curves: [loss]
paper:
  runs: 10
  note: The <b>paper</b> is made up.
  values:
    - {temperature: 0.1,  best: [80, 1], last: 79}
    - {temperature: 0.25, best: [84, 1]}
    - {temperature: 0.5,  best: [83, 1]}
    - {temperature: 1,    best: [82, 1]}
    - {temperature: free, best: [85, 1]}
notes: ["A <b>note</b>."]
'''


def made_up(scale: str, means: dict, seeds: int = 3, spread: float = 0.005, **other) -> list[dict]:
    "Ledger rows with made-up metrics: each mean plus −spread, 0, +spread, …"
    rows = []
    for temperature, mean in means.items():
        for seed in range(seeds):
            shift, epochs = spread * (seed % 3 - 1), {"quick": 12}.get(scale, 800)
            rows.append(dict(
                id=f"{scale}-{temperature}-{seed}", spec="madeup", scale=scale, seconds=10.0, device="cpu",
                parameters={"temperature": temperature, "seed": seed, "lr": 0.001, "epochs": epochs},
                metrics={"best": mean + shift, "last": mean - 0.01 + shift, "uniformity": -2.0 - 0.1 * seed, "tolerance": 0.3 + mean / 10},
                hardware="a <processor>", peak_memory_mib=100.0, commit="abcdef0123", dirty=False,
                finished=f"1900-01-01T00:00:0{seed}+00:00", notebook_sha256="0", curves={"loss": [[1, 2], [2.0, 1.0]]}) | other)
    return rows


PAPERS = {"0.1": 0.80, "0.25": 0.84, "0.5": 0.83, "1": 0.82, "free": 0.85}


@pytest.fixture
def spec(tmp_path) -> Spec:
    (tmp_path / "madeup.yaml").write_text(SPEC)
    return load_spec(tmp_path / "madeup.yaml")


def changed(tmp_path: Path, *pairs: tuple[str, str]) -> Spec:
    text = SPEC
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "madeup.yaml").write_text(text)
    return load_spec(tmp_path / "madeup.yaml")


# --- verdicts -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale, values, mean, std, expected", [
    ("paper", [83, 84, 85], 84.0, 0.1, "reproduced"),
    ("paper", [83, 84, 85], 90.0, 0.1, "differs"),
    ("paper", [83, 84, 85], 90.0, 4.0, "reproduced"),  # a paper with a large std is easy to reproduce
    ("paper", [84, 84, 84], 84.0, None, "reproduced"),
    ("paper", [84, 84, 84], 84.01, None, "differs"),
    ("paper", [84, 84], 84.0, 0.1, "reduced scale"),
    ("paper", [84], 84.0, 0.1, "reduced scale"),
    ("quick", [84, 84, 84], 84.0, 0.1, "reduced scale"),
    ("smoke", [84, 84, 84], 50.0, 0.1, "reduced scale"),
    ("paper", [], 84.0, 0.1, "not run"),
    ("quick", [], None, None, "not run"),
    ("paper", [83, 84, 85], None, None, ""),
])
def test_every_branch_of_the_verdict(scale, values, mean, std, expected): assert verdict(scale, values, mean, std) == expected


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_verdict_is_the_t_interval_widened_by_the_papers_std(n):
    values = np.random.default_rng(n).normal(84, 1, n)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    for edge, side in ((low - 0.3, -1), (high + 0.3, 1)):
        assert verdict("paper", values, edge - side * 1e-9, 0.3) == "reproduced"
        assert verdict("paper", values, edge + side * 1e-9, 0.3) == "differs"


# --- which rows count -----------------------------------------------------------------------------------------------

def test_scales_are_never_mixed_and_other_parameters_never_counted(spec):
    rows = made_up("paper", PAPERS) + made_up("quick", {"0.1": 0.5}) + made_up("paper", {"0.1": 0.1}, set={"lr": 0.001})
    rows += [row | {"parameters": row["parameters"] | {"epochs": 200}} for row in made_up("paper", {"0.25": 0.2})]
    rows += [row | {"parameters": row["parameters"] | {"seed": 7}} for row in made_up("paper", {"0.5": 0.2}, seeds=1)]
    paper, quick = results(spec, "paper", rows), results(spec, "quick", rows)
    assert list(paper.values(("0.1",), "best").values()) == pytest.approx([79.5, 80, 80.5])
    assert list(quick.values(("0.1",), "best").values()) == pytest.approx([49.5, 50, 50.5])
    assert (len(paper.rows), paper.others) == (15, 7) and (len(quick.rows), quick.others) == (3, 0)
    assert "7 further rows" in " ".join(summary(paper)) and quick.wanted == 15


def test_numbers_fit_however_they_are_written_and_the_later_row_counts(spec):
    (row,) = made_up("quick", {"0.50": 0.5}, seeds=1)
    parameters = row["parameters"] | {"temperature": "5e-1", "epochs": 12.0, "added since": 1}
    later = row | {"id": "later", "finished": "1900-02-01T00:00:00+00:00", "parameters": parameters}
    assert [row["id"] for row in results(spec, "quick", [later, row]).rows] == ["later"]


def test_a_metric_that_is_not_finite_is_left_out_and_told(spec):
    rows = made_up("quick", PAPERS)
    rows[0]["metrics"]["best"] = None
    found = results(spec, "quick", rows)
    assert len(found.values(("0.1",), "best")) == 2 and "1 runs have no finite best" in " ".join(summary(found))
    assert "n = 2" in text_table(comparison(found, "best"))
    for row in rows: row["metrics"]["best"] = None
    found = results(spec, "quick", rows)
    assert claims(found) == [] and "not run" in text_table(comparison(found, "best")) and text_report(found)


def test_the_shown_scales(spec):
    rows = {scale: made_up(scale, {"0.5": 0.5}, seeds=1) for scale in ("smoke", "quick", "paper")}
    assert shown_scales(spec, []) == ["paper"] and shown_scales(spec, rows["smoke"]) == ["smoke"]
    assert shown_scales(spec, rows["smoke"] + rows["quick"]) == ["quick"]
    assert shown_scales(spec, sum(rows.values(), [])) == ["paper", "quick"]


# --- tables ---------------------------------------------------------------------------------------------------------

def test_the_comparison_states_paper_here_difference_and_verdict(spec):
    rows = made_up("paper", {"0.1": 0.80, "0.25": 0.90, "1": 0.82}) + made_up("paper", {"0.5": 0.83}, seeds=2)
    best, last = (comparison(results(spec, "paper", rows), metric) for metric in ("best", "last"))
    assert best.title == "top-1, best epoch, %"
    assert best.head == ["temperature", "paper mean (std)", "here, paper scale: mean (std, n)", "difference", "verdict"]
    assert best.rows == [["0.1", "80.00 (1.00)", "80.00 (.50, n = 3)", "+0.00", "reproduced"],
                         ["0.25", "84.00 (1.00)", "90.00 (.50, n = 3)", "+6.00", "differs"],
                         ["0.5", "83.00 (1.00)", "82.75 (.35, n = 2)", "−0.25", "reduced scale"],
                         ["1", "82.00 (1.00)", "82.00 (.50, n = 3)", "+0.00", "reproduced"],
                         ["free", "85.00 (1.00)", "–", "–", "not run"]]
    assert last.title == "top-1, last epoch, %"  # another epoch, named; a paper value without std, and settings without any
    assert last.rows[0] == ["0.1", "79.00", "79.00 (.50, n = 3)", "+0.00", "reproduced"]
    assert last.rows[1][-1] == "no paper value"


def test_tables_fit_the_width(spec):
    found = results(spec, "quick", made_up("quick", PAPERS))
    for width in (40, 60, 100):
        for table in (comparison(found, "best"), overview(found)):
            lines = text_table(table, width).splitlines()
            assert max(map(len, lines)) <= width
            assert all(any(cell in line for line in lines) for row in table.rows for cell in row)
    assert max(map(len, text_report(found).splitlines())) <= 100


def test_a_spec_without_paper_numbers_or_temperatures_is_still_reported(tmp_path):
    text = SPEC[:SPEC.index("paper:\n  runs")]
    text = text.replace("temperature: [0.1, 0.25, 0.5, 1, free]", "kind: [a, b]").replace("temperature: [0.5]", "kind: [a]")
    (tmp_path / "madeup.yaml").write_text(text)
    spec, rows = load_spec(tmp_path / "madeup.yaml"), made_up("quick", {"a": 0.5, "b": 0.6})
    for row in rows: row["parameters"]["kind"] = row["parameters"].pop("temperature")
    found = results(spec, "quick", rows)
    assert claims(found) == [] and sensitivity_figure(found) is None and geometry_figure(found) is None
    assert curves_figure(found) is not None
    shown = text_report(found)
    assert "60.00 (.50)" in shown and "verdict" not in shown


def test_further_axes_are_rows_of_their_own_and_averaged_for_the_claims(tmp_path):
    spec = changed(tmp_path, ("  seed: [0, 1, 2]", "  label: [cat, dog]\n  seed: [0, 1, 2]"),
                   *((f"temperature: {tau},", f"temperature: {tau}, label: cat,") for tau in PAPERS))
    rows = []
    for label, shift in (("cat", 0.0), ("dog", 0.1)):
        for row in made_up("paper", PAPERS):
            row["parameters"]["label"] = label
            rows.append(row | {"id": row["id"] + label, "metrics": {"best": row["metrics"]["best"] + shift}})
    found = results(spec, "paper", rows)
    assert comparison(found, "best").rows[0] == ["0.1 · cat", "80.00 (1.00)", "80.00 (.50, n = 3)", "+0.00", "reproduced"]
    assert comparison(found, "best").rows[1][-1] == "no paper value"
    assert by_temperature(found, "best")["free"] == pytest.approx([89.5, 90, 90.5])
    fewer = results(spec, "paper", rows[:-1])  # a seed without one of the labels is left out
    assert by_temperature(fewer, "best")["free"] == pytest.approx([89.5, 90])
    assert sensitivity_figure(found) is not None


# --- claims ---------------------------------------------------------------------------------------------------------

def claim_of(spec, means, spread=0.005, seeds=3, strategy="free"):
    found = results(spec, "quick", made_up("quick", means, spread=spread, seeds=seeds))
    return strategy_claim(found, "best", strategy)


@pytest.mark.parametrize("free, expected", [
    (0.90, "better than the best"), (0.841, "within noise of the best"), (0.80, "worse than the best")])
def test_a_strategy_against_the_best_fixed_tau_by_welchs_test(spec, free, expected):
    claim = claim_of(spec, PAPERS | {"free": free})
    assert claim.answer == expected and "τ = 0.25" in claim.evidence
    shifts = np.array([-0.5, 0, 0.5])
    test = stats.ttest_ind(100 * free + shifts, 84 + shifts, equal_var=False)
    shown = re.search(r"p [=<] ([\d.]+)$", claim.evidence)
    assert float(shown[1]) == pytest.approx(test.pvalue, abs=0.006) or test.pvalue < 0.001 and shown[0] == "p < 0.001"


def test_lower_is_better_where_the_spec_says_so(tmp_path):
    spec = changed(tmp_path, ("best: {title: \"top-1, best epoch\", percent: true}", "best: {title: error, percent: true, better: low}"))
    claim = claim_of(spec, PAPERS | {"free": 0.70})
    assert claim.answer == "better than the best" and "τ = 0.1 " in claim.evidence


def test_what_cannot_be_decided_is_not(spec):
    assert claim_of(spec, PAPERS, seeds=2).answer == "not decidable"
    assert claim_of(spec, PAPERS, spread=0.0).answer == "not decidable"  # no spread, no test
    assert claim_of(spec, {"free": 0.8}) is None and claim_of(spec, {"0.1": 0.8}) is None
    two = results(spec, "quick", made_up("quick", PAPERS, seeds=2))
    assert spread_claim(two, "best").answer == "not decidable"
    assert "range of 4.00 points" in spread_claim(two, "best").evidence
    assert spread_claim(results(spec, "quick", made_up("quick", {"0.1": 0.8, "free": 0.9})), "best") is None


def test_whether_tau_matters(spec):
    moved = spread_claim(results(spec, "quick", made_up("quick", PAPERS)), "best")
    assert moved.answer == "it matters" and "from 80.00 (τ = 0.1) to 84.00 (τ = 0.25)" in moved.evidence
    p = stats.alexandergovern(*(np.array([mean - 0.5, mean, mean + 0.5]) for mean in (80, 84, 83, 82))).pvalue
    assert moved.evidence.endswith(f"p = {p:.3f}") and p < 0.01
    same = spread_claim(results(spec, "quick", made_up("quick", {"0.1": 0.8, "0.25": 0.801, "0.5": 0.802})), "best")
    assert same.answer == "within noise"


def test_the_order_of_the_settings(spec):
    claim = lambda means: order_claim(results(spec, "quick", made_up("quick", means)), "best")
    assert claim({name: mean - 0.3 for name, mean in PAPERS.items()}).answer == "it agrees"
    assert claim({name: 1 - mean for name, mean in PAPERS.items()}).answer == "it is reversed"
    one_exchange = claim(dict(zip(PAPERS, (0.8, 0.84, 0.82, 0.83, 0.85))))
    assert one_exchange.answer == "no clear agreement"  # of five settings, that is chance enough
    few = claim({"0.1": 0.8, "0.25": 0.84, "0.5": 0.83, "free": 0.85})
    assert few.answer == "not decidable"
    assert few.evidence.startswith("paper 0.1 < 0.5 < 0.25 < free; here 0.1 < 0.5 < 0.25 < free")
    assert claim(dict.fromkeys(PAPERS, 0.5)).answer == "not decidable" and claim({"0.1": 0.5}) is None


# --- the page -------------------------------------------------------------------------------------------------------

def test_the_page_escapes_and_holds_everything(spec, tmp_path):
    for row in made_up("paper", PAPERS) + made_up("quick", PAPERS): Ledger("madeup", tmp_path).put(row)
    page = report([spec], home=tmp_path, out=(out := StringIO()))
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "figures" / "report.html" and html.startswith("<!doctype html>")
    for raw in ("<script>", "<i>means", "<b>paper", "<b>note", "a <processor>", 'Nobody "1900"'): assert raw not in html
    for escaped in ("&lt;script&gt;alert(1)", "&lt;b&gt;note", "a &lt;processor&gt;", "https://example.org/?a=1&amp;b=2"):
        assert escaped in html
    outside = re.sub(r'src="data:[^"]*"', "", html.replace('href="https://example.org/?a=1&amp;b=2"', ""))
    assert "http" not in outside and "url(" not in outside and "<script" not in outside  # nothing is loaded from elsewhere
    assert html.count('src="data:image/svg+xml;base64,') == 6 and "prefers-color-scheme: dark" in html
    for shown in ("reproduced", "reduced scale", "temp-nce run madeup --scale paper --set temperature=free", "paper-free-0"):
        assert shown in html
    assert "scale paper" in out.getvalue() and "scale quick" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 100
    figures = product(("paper", "quick"), ("sensitivity", "geometry", "curves"), ("svg", "png"))
    expected = {f"madeup-{scale}-{name}.{kind}" for scale, name, kind in figures} | {"report.html"}
    assert {path.name for path in page.parent.iterdir()} == expected


def test_the_same_ledger_makes_the_same_bytes(spec, tmp_path):
    for row in made_up("quick", PAPERS): Ledger("madeup", tmp_path).put(row)
    files = lambda page: {path.name: path.read_bytes() for path in page.parent.iterdir()}
    assert files(report([spec], home=tmp_path, out=StringIO())) == files(report([spec], home=tmp_path, out=StringIO()))


def test_one_geometry_mark_for_each_run_that_has_both_metrics(spec):
    rows = made_up("quick", PAPERS)
    rows[0]["metrics"].pop("uniformity")
    found = results(spec, "quick", rows)
    figure = geometry_figure(found, ("uniformity", "tolerance"), ("tolerance", "best"))
    assert [sum(len(each.get_offsets()) for each in axes.collections) for axes in figure.axes] == [14, 15]
    assert geometry_figure(found, ("uniformity", "nonesuch")) is None
    plt.close(figure)


def test_a_label_leaves_out_what_all_settings_share(tmp_path):
    two = SPEC[:SPEC.index("paper:\n  runs")].replace("temperature: [0.1, 0.25, 0.5, 1, free]", "temperature: [0.1, free]\n  lr: [1, 2]").replace("fixed: {lr: 1e-3}\n", "")
    for text, label in ((two, "τ = 0.1 · 2"), (two.replace("lr: [1, 2]", "lr: [2]"), "τ = 0.1")):
        (tmp_path / "madeup.yaml").write_text(text)
        assert results(load_spec(tmp_path / "madeup.yaml"), "quick", []).label(("0.1", "2")) == label


def test_a_reduced_scale_says_that_the_paper_scale_was_not_run(spec):
    quick = made_up("quick", PAPERS)
    assert "The scale paper, 15 runs: not run." in summary(results(spec, "quick", quick))
    assert "not run" not in " ".join(summary(results(spec, "quick", quick + made_up("paper", {"0.5": 0.8}))))


def test_a_spec_without_any_row_is_all_not_run(spec, tmp_path):
    html = report([spec], home=tmp_path, out=(out := StringIO())).read_text()
    said = out.getvalue()
    assert said.count("not run") == 10 and "0 of 15 runs stand in the ledger" in said and "reproduced" not in said
    assert "<img" not in html
    with pytest.raises(ValueError, match="no ledger in"): report(home=tmp_path)


def test_the_tsne_grid_comes_from_run_folders_and_else_from_the_last_picture(spec, tmp_path):
    rows = made_up("quick", PAPERS, seeds=2)
    for row in rows: Ledger("madeup", tmp_path).put(row)
    found = results(spec, "quick", rows)
    assert tsne_figure(found, tmp_path) is None
    assert "There is no t-SNE picture" in report([spec], home=tmp_path, out=StringIO()).read_text()
    for row in rows[::2]:
        (folder := tmp_path / "data" / "runs" / "madeup" / row["id"]).mkdir(parents=True)
        np.savez(folder / "embeddings.npz", labels=np.arange(20) % 4, embeddings=np.zeros((20, 3), "float16"),
                 tsne=np.random.default_rng(0).normal(size=(20, 2)).astype("float32"))
    titles = [ax.get_title(loc="left") + ax.get_title() for ax in tsne_figure(found, tmp_path).axes]
    assert list(filter(None, titles)) == ["τ = 0.1", "τ = 0.25", "τ = 0.5", "τ = 1", "free"]
    page = report([spec], home=tmp_path, out=StringIO()).read_text()
    assert page.count("data:image/png") == 1
    for row in rows[::2]: (tmp_path / "data" / "runs" / "madeup" / row["id"] / "embeddings.npz").unlink()
    assert report([spec], home=tmp_path, out=StringIO()).read_text() == page  # the picture that was drawn last

"""Tables, verdicts, claims and the page, on ledgers whose numbers are made up."""
import hashlib
import re
from io import StringIO
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from temp_nce.lab.figures import curves_figure, geometry_figure, hill_figure, ranking_figure, tsne_figure
from temp_nce.lab.judge import claims, order_claim, spread_claim, strategy_claims
from temp_nce.lab.ledger import Ledger
from temp_nce.lab.report import comparison, overview, report, shown_scales, summary, text_report, text_table
from temp_nce.lab.results import View, levels, results, setting_command, setting_label, tidy
from temp_nce.lab.spec import Spec, load_spec

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
curves: [loss, top1]
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


def made_up(scale: str, means: dict, seeds: int = 3, spread: float = 0.005, noise: float = 0.0, **other) -> list[dict]:
    "Ledger rows with made-up metrics: each mean plus −spread, 0, +spread, … (the luck of a seed), and noise."
    rows, draw = [], np.random.default_rng(0)
    for temperature, mean in means.items():
        for seed in range(seeds):
            shift, epochs = spread * (seed % 3 - 1) + noise * draw.normal(), {"quick": 12}.get(scale, 800)
            rows.append(dict(
                id=name(f"{scale}-{temperature}-{seed}"), spec="madeup", scale=scale, seconds=10.0, device="cpu",
                parameters={"temperature": temperature, "seed": seed, "lr": 0.001, "epochs": epochs},
                metrics={"best": mean + shift, "last": mean - 0.01 + shift, "uniformity": -2.0 - 0.1 * seed,
                         "tolerance": 0.3 + mean / 10},
                hardware="a <processor>", peak_memory_mib=100.0, commit="abcdef0123", dirty=False,
                finished=f"1900-01-01T00:00:0{seed}+00:00", notebook_sha256="0",
                curves={"top1": [[1, 2], [0.2, mean]], "loss": [[1, 2], [2.0, 1.0]]}) | other)
    return rows


def name(text: str) -> str: return hashlib.sha256(text.encode()).hexdigest()[:12]


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


# --- which rows count -----------------------------------------------------------------------------------------------

def test_scales_are_never_mixed_and_other_parameters_never_counted(spec):
    rows = made_up("paper", PAPERS) + made_up("quick", {"0.1": 0.5}) + made_up("paper", {"0.1": 0.1}, set={"lr": 0.001})
    rows += [row | {"parameters": row["parameters"] | {"epochs": 200}} for row in made_up("paper", {"0.25": 0.2})]
    rows += [row | {"parameters": row["parameters"] | {"seed": 7}} for row in made_up("paper", {"0.5": 0.2}, seeds=1)]
    frame = tidy(spec, rows)
    paper, quick = View(frame, spec, "paper"), View(frame, spec, "quick")
    assert paper.table("best")["0.1"].to_list() == pytest.approx([79.5, 80, 80.5])
    assert quick.table("best")["0.1"].to_list() == pytest.approx([49.5, 50, 50.5])
    assert (len(paper.rows), paper.others) == (15, 7) and (len(quick.rows), quick.others) == (3, 0)
    assert ("7 further rows" in " ".join(summary(frame, spec, "paper"))
            and "3 of 15 runs" in " ".join(summary(frame, spec, "quick")))


def test_numbers_fit_however_they_are_written_and_the_later_row_counts(spec):
    (row,) = made_up("quick", {"0.50": 0.5}, seeds=1)
    parameters = row["parameters"] | {"temperature": "5e-1", "epochs": 12.0, "added since": 1}
    later = row | {"id": name("later"), "finished": "1900-02-01T00:00:00+00:00", "parameters": parameters}
    assert View(tidy(spec, [later, row]), spec, "quick").rows.id.to_list() == [name("later")]


def test_results_is_one_row_a_run_from_the_ledgers_of_a_home(spec, tmp_path):
    for row in made_up("quick", PAPERS) + made_up("quick", {"0.1": 0.1}, seeds=1, set={"lr": 1}, id="0" * 12):
        Ledger("madeup", tmp_path).put(row)
    frame, every = results(spec, home=tmp_path), results([spec], "quick", tmp_path, others=True)
    assert len(frame) == 15 and len(every) == 16 and (~every.stated).sum() == 1 and frame.id.is_unique
    head = ["spec", "scale", "setting", "temperature", "seed", "best", "last", "uniformity", "tolerance", "seconds",
            "device"]
    assert list(frame)[:len(head)] == head and {"commit", "id", "parameters"} <= set(frame) and "stated" not in frame
    assert (frame.groupby("temperature", sort=False).best.mean().to_dict() == pytest.approx(PAPERS)
            and frame.best.dtype == float)
    assert len(results(spec, "paper", tmp_path)) == 0
    with pytest.raises(ValueError, match="did you mean quick"): results(spec, "quik", tmp_path)
    with pytest.raises(ValueError, match="unknown spec nonesuch"): results("nonesuch", home=tmp_path)
    with pytest.raises(ValueError, match="no ledger in"): results(home=tmp_path / "empty")


def test_a_metric_that_is_not_finite_is_left_out_and_told(spec):
    rows = made_up("quick", PAPERS)
    rows[0]["metrics"]["best"] = None
    frame = tidy(spec, rows)
    assert (View(frame, spec, "quick").table("best")["0.1"].count() == 2
            and "1 runs have no finite best" in " ".join(summary(frame, spec, "quick")))
    assert "n = 2" in text_table(comparison(frame, spec, "quick", "best"))
    for row in rows: row["metrics"]["best"] = None
    frame = tidy(spec, rows)
    assert (claims(frame, spec, "quick") == [] and "not run" in text_table(comparison(frame, spec, "quick", "best"))
            and text_report(frame, spec, "quick"))


@pytest.mark.parametrize("metrics", [{}, None, {"best": "eighty"}, {"best": float("nan")}, {"best": [1]},
                                     {"best": True}], ids=repr)
def test_a_row_without_usable_metrics_is_counted_and_breaks_nothing(spec, metrics):
    rows = made_up("quick", PAPERS)
    rows[0]["metrics"] = metrics
    frame = tidy(spec, rows)
    shown = text_report(frame, spec, "quick")
    assert "15 of 15 runs" in shown and "1 runs have no finite best" in shown
    for draw in (hill_figure, geometry_figure, curves_figure, ranking_figure): plt.close(draw(frame, spec, "quick"))


def test_the_shown_scales(spec):
    rows = {scale: made_up(scale, {"0.5": 0.5}, seeds=1) for scale in ("smoke", "quick", "paper")}
    shown = lambda rows: shown_scales(spec, tidy(spec, rows))
    assert shown([]) == ["paper"] and shown(rows["smoke"]) == ["smoke"]
    assert shown(rows["smoke"] + rows["quick"]) == ["quick"]
    assert shown(sum(rows.values(), [])) == ["paper", "quick"]


# --- tables ---------------------------------------------------------------------------------------------------------

def test_the_comparison_states_paper_here_difference_interval_and_verdict(spec):
    frame = tidy(spec, made_up("paper", {"0.1": 0.80, "0.25": 0.90, "1": 0.82})
                 + made_up("paper", {"0.5": 0.83}, seeds=2))
    best, last = (comparison(frame, spec, "paper", metric) for metric in ("best", "last"))
    assert View(frame, spec, "paper").title("best") == "top-1, best epoch, %"
    assert list(best) == ["temperature", "paper mean (std)", "here, paper scale: mean (std, n)", "difference [95 %]",
                          "verdict"]
    assert best.to_numpy().tolist() == [["0.1", "80.00 (1.00)", "80.00 (.50, n = 3)", "+0.00 [−1.00, +1.00]",
                                         "agrees, imprecise"],
                                        ["0.25", "84.00 (1.00)", "90.00 (.50, n = 3)", "+6.00 [+5.00, +7.00]",
                                         "differs"],
                                        ["0.5", "83.00 (1.00)", "82.75 (.35, n = 2)", "−0.25", "reduced scale"],
                                        ["1", "82.00 (1.00)", "82.00 (.50, n = 3)", "+0.00 [−1.00, +1.00]",
                                         "agrees, imprecise"],
                                        ["free", "85.00 (1.00)", "–", "–", "not run"]]
    assert last.iloc[0].to_list() == ["0.1", "79.00", "79.00 (.50, n = 3)", "+0.00 [−1.24, +1.24]", "agrees, imprecise"]
    # another epoch, named; a paper value without std, and settings without any
    assert last.verdict[1] == "no paper value"
    assert ("1 of its 6 numbers come without a std or a number of runs and are taken as fixed"
            in " ".join(summary(frame, spec, "paper")))


def test_a_margin_and_another_data_set_are_the_specs_to_state(tmp_path):
    rows = made_up("paper", PAPERS)
    words = lambda *pairs: set(comparison(tidy(spec := changed(tmp_path, *pairs), rows), spec, "paper", "best").verdict)
    assert words(("curves:", "margin: 2\ncurves:")) == {"reproduced"}
    assert words(("curves:", "margin: {best: 1.2}\ncurves:")) == {"reproduced"}
    assert words(("  runs: 10", "  data: other\n  runs: 10")) == {"other data"}


def test_tables_fit_the_width(spec):
    frame = tidy(spec, made_up("quick", PAPERS))
    for width in (40, 60, 100):
        for table in (comparison(frame, spec, "quick", "best"), overview(frame, spec, "quick")):
            lines = text_table(table, width).splitlines()
            assert max(map(len, lines)) <= width
            assert all(any(cell in line for line in lines) for row in table.to_numpy() for cell in row)
    assert max(map(len, text_report(frame, spec, "quick").splitlines())) <= 100


def test_a_spec_without_paper_numbers_or_temperatures_is_still_reported(tmp_path):
    text = SPEC[:SPEC.index("paper:\n  runs")]
    text = text.replace("temperature: [0.1, 0.25, 0.5, 1, free]", "kind: [a, b]").replace("temperature: [0.5]",
                                                                                          "kind: [a]")
    (tmp_path / "madeup.yaml").write_text(text)
    spec, rows = load_spec(tmp_path / "madeup.yaml"), made_up("quick", {"a": 0.5, "b": 0.6})
    for row in rows: row["parameters"]["kind"] = row["parameters"].pop("temperature")
    view = tidy(spec, rows), spec, "quick"
    assert claims(*view) == [] and hill_figure(*view) is None and geometry_figure(*view) is None
    assert curves_figure(*view) is not None
    shown = text_report(*view)
    assert "60.00 (.50)" in shown and "verdict" not in shown


def test_further_axes_are_rows_of_their_own_and_levels_for_the_claims(tmp_path):
    spec = changed(tmp_path, ("  seed: [0, 1, 2]", "  label: [cat, dog]\n  seed: [0, 1, 2]"),
                   *((f"temperature: {tau},", f"temperature: {tau}, label: cat,") for tau in PAPERS))
    rows = []
    for label, shift in (("cat", 0.0), ("dog", 0.1)):
        for row in made_up("paper", PAPERS, noise=0.001):
            row["parameters"]["label"] = label
            rows.append(row | {"id": name(row["id"] + label), "metrics": {"best": row["metrics"]["best"] + shift}})
    frame = tidy(spec, rows)
    table = comparison(frame, spec, "paper", "best")
    assert table.iloc[0, :2].to_list() == ["0.1 · cat", "80.00 (1.00)"] and table.verdict[1] == "no paper value"
    found = levels(View(frame, spec, "paper"), "best")
    assert (list(found) == ["label = cat", "label = dog"] and found["label = dog"].free.mean()
            - found["label = cat"].free.mean() == pytest.approx(10))
    asked = [claim.question for claim in claims(frame, spec, "paper")]
    assert asked[:2] == ["Does a fixed τ matter? (label = cat)",
                         "How does free stand to the best fixed τ? (label = cat)"] and len(asked) == 5
    assert len(hill_figure(frame, spec, "paper").axes) == 2


def test_baselines_come_first_and_are_no_temperatures(tmp_path):
    spec = changed(tmp_path, ("[0.1, 0.25, 0.5, 1, free]", "[0.1, 0.25, 0.5, 1, free, pixels, 9]"),
                   ("curves:", "baselines: [pixels, 9]\ncurves:"))
    frame = tidy(spec, made_up("quick", PAPERS | {"pixels": 0.99, "9": 0.2}, noise=0.001))
    assert overview(frame, spec, "quick").temperature.to_list() == ["pixels", "9", "0.1", "0.25", "0.5", "1", "free"]
    questions = claims(frame, spec, "quick")
    assert (not any("pixels" in claim.question for claim in questions) and "τ = 0.25)" in questions[0].evidence
            and "τ = 9" not in questions[0].evidence)
    (axes,) = hill_figure(frame, spec, "quick").axes
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert (dashed == pytest.approx([99, 20], abs=0.2) and [text.get_text() for text in axes.get_xticklabels()]
            == ["0.1", "0.25", "0.5", "1"])
    assert {"pixels", "9", "free"} <= {text.get_text() for text in axes.texts}


def test_a_mean_over_an_axis_wants_all_its_parts():
    spec, frame = load_spec("anomaly"), results("anomaly", "quick")
    titles = lambda figure: {axes.get_title(loc="left") or axes.get_title() for axes in figure.axes}
    labels = lambda figure: {label.get_text() for label in figure.axes[0].get_yticklabels()}
    both = titles(curves_figure(frame, spec, "quick")) & labels(ranking_figure(frame, spec, "quick", least=3))
    assert {"free", "τ = 0.25"} <= both
    less = frame[(frame.normal != "cat") | (frame.temperature.astype(str) != "free")]
    either = titles(curves_figure(less, spec, "quick")) | labels(ranking_figure(less, spec, "quick", least=3))
    assert "free" not in either and "τ = 0.25" in either
    assert curves_figure(frame[frame.normal != "cat"], spec, "quick") is None


# --- claims ---------------------------------------------------------------------------------------------------------

def claims_of(spec, means, noise=0.001, seeds=3):
    frame = tidy(spec, made_up("quick", means, noise=noise, seeds=seeds))
    return next(iter(levels(View(frame, spec, "quick"), "best").values()))


@pytest.mark.parametrize("free, seeds, expected", [(0.90, 3, "better"), (0.84, 12, "equivalent"), (0.80, 3, "worse"),
                                                   (0.845, 3, "undecided")])
def test_a_strategy_against_the_best_fixed_tau(tmp_path, free, seeds, expected):
    spec = changed(tmp_path, ("seed: [0, 1, 2]", f"seed: {list(range(12))}"))
    (claim,) = strategy_claims(claims_of(spec, PAPERS | {"free": free}, 0.01 if expected == "undecided" else 0.001,
                                         seeds), spec, "best")
    assert claim.answer == expected and "τ = 0.25" in claim.evidence and f"{seeds} shared seeds" in claim.evidence


def test_lower_is_better_where_the_spec_says_so(tmp_path):
    spec = changed(tmp_path, ("best: {title: \"top-1, best epoch\", percent: true}",
                              "best: {title: error, percent: true, better: low}"))
    (claim,) = strategy_claims(claims_of(spec, PAPERS | {"free": 0.70}), spec, "best")
    assert claim.answer == "better" and "τ = 0.1 " in claim.evidence


def test_what_cannot_be_decided_is_not(spec):
    of = lambda *some, **more: strategy_claims(claims_of(spec, *some, **more), spec, "best")
    assert of(PAPERS, seeds=2)[0].answer == "undecided" and "needs 3 shared" in of(PAPERS, seeds=2)[0].evidence
    assert of(PAPERS, noise=0.0)[0].answer == "undecided"  # no spread, no test
    assert of({"free": 0.8}) == [] and of({"0.1": 0.8}) == []
    two = spread_claim(claims_of(spec, PAPERS, noise=0, seeds=2), spec, "best")
    assert two.answer == "undecided" and "range of 4.00 points" in two.evidence
    assert spread_claim(claims_of(spec, {"0.1": 0.8, "free": 0.9}), spec, "best") is None


def test_whether_tau_matters(spec):
    moved = spread_claim(claims_of(spec, PAPERS), spec, "best")
    assert (moved.answer == "it matters" and "(τ = 0.1) to" in moved.evidence
            and "(τ = 0.25), a range of" in moved.evidence)
    assert moved.evidence.endswith("Friedman's test over 3 shared seeds, p = 0.029")
    same = spread_claim(claims_of(spec, {"0.1": 0.8, "0.25": 0.801, "0.5": 0.802}, noise=0.01), spec, "best")
    assert same.answer == "undecided"


def test_the_order_of_the_settings(spec):
    claim = lambda means: order_claim(View(tidy(spec, made_up("quick", means)), spec, "quick"), "best")
    assert claim({name: mean - 0.3 for name, mean in PAPERS.items()}).answer == "it agrees"
    assert claim({name: 1 - mean for name, mean in PAPERS.items()}).answer == "it is reversed"
    one_exchange = claim(dict(zip(PAPERS, (0.8, 0.84, 0.82, 0.83, 0.85))))
    assert one_exchange.answer == "no clear agreement"  # of five settings, that is chance enough
    few = claim({"0.1": 0.8, "0.25": 0.84, "0.5": 0.83, "free": 0.85})
    assert few.answer == "undecided"
    assert few.evidence.startswith("paper 0.1 < 0.5 < 0.25 < free; here 0.1 < 0.5 < 0.25 < free")
    assert claim(dict.fromkeys(PAPERS, 0.5)).answer == "undecided" and claim({"0.1": 0.5}) is None


# --- the page -------------------------------------------------------------------------------------------------------

def test_the_page_escapes_and_holds_everything(spec, tmp_path):
    for row in made_up("paper", PAPERS, noise=0.001) + made_up("quick", PAPERS): Ledger("madeup", tmp_path).put(row)
    page = report([spec], home=tmp_path, out=(out := StringIO()))
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "figures" / "report.html" and html.startswith("<!doctype html>")
    for raw in ("<script>", "<i>means", "<b>paper", "<b>note", "a <processor>", 'Nobody "1900"'): assert raw not in html
    for escaped in ("&lt;script&gt;alert(1)", "&lt;b&gt;note", "a &lt;processor&gt;",
                    "https://example.org/?a=1&amp;b=2"):
        assert escaped in html
    outside = re.sub(r'src="data:[^"]*"', "", html.replace('href="https://example.org/?a=1&amp;b=2"', ""))
    # nothing is loaded from elsewhere
    assert "http" not in outside and "url(" not in outside and "<script" not in outside
    assert html.count('src="data:image/svg+xml;base64,') == 6 and "prefers-color-scheme: dark" in html
    for shown in ("agrees, imprecise", "reduced scale", "temp-nce run madeup --scale paper --set temperature=free",
                  name("paper-free-0")):
        assert shown in html
    assert "scale paper" in out.getvalue() and "scale quick" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 100
    figures = product(("paper", "quick"), ("sensitivity", "geometry", "curves"), ("svg", "png"))
    expected = {f"madeup-{scale}-{name}.{kind}" for scale, name, kind in figures} | {"report.html"}
    assert {path.name for path in page.parent.iterdir()} == expected


def test_the_same_ledger_makes_the_same_bytes_and_unchanged_figures_are_not_written(spec, tmp_path):
    for row in made_up("quick", PAPERS): Ledger("madeup", tmp_path).put(row)
    files = lambda page: {path.name: path.read_bytes() for path in page.parent.iterdir()}
    times = lambda page: {path.name: path.stat().st_mtime_ns for path in page.parent.iterdir()
                          if path.suffix != ".html"}
    first = (page := report([spec], home=tmp_path, out=StringIO())) and (files(page), times(page))
    second = (page := report([spec], home=tmp_path, out=StringIO())) and (files(page), times(page))
    assert first == second
    Ledger("madeup", tmp_path).put(made_up("quick", {"0.1": 0.7}, seeds=1)[0])
    assert (times(report([spec], home=tmp_path, out=StringIO()))["madeup-quick-sensitivity.svg"]
            > first[1]["madeup-quick-sensitivity.svg"])


def test_a_mean_and_a_dot_for_each_run_that_has_both_metrics(spec):
    rows = made_up("quick", PAPERS)
    rows[0]["metrics"].pop("uniformity")
    view = tidy(spec, rows), spec, "quick"
    figure = geometry_figure(*view, ("uniformity", "tolerance"), ("tolerance", "best"))
    dots = lambda axes: sum(len(each.get_offsets()) for each in axes.collections if hasattr(each, "get_sizes")
                            and len(each.get_sizes()))
    assert [dots(axes) for axes in figure.axes] == [14, 15] and [len(axes.containers) for axes in figure.axes] == [5, 5]
    assert ([{text.get_text() for text in axes.texts} for axes in figure.axes]
            == 2 * [{"τ = 0.1", "τ = 0.25", "τ = 0.5", "τ = 1", "free"}])
    assert geometry_figure(*view, ("uniformity", "nonesuch")) is None
    plt.close(figure)


def test_curves_have_a_panel_a_temperature_and_no_loss(spec):
    figure = curves_figure(tidy(spec, made_up("quick", PAPERS)), spec, "quick")
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    assert titles == ["τ = 0.1", "τ = 0.25", "τ = 0.5", "τ = 1", "free"] and figure.axes[0].get_ylabel() == "top1"
    assert curves_figure(tidy(spec, made_up("quick", PAPERS, curves={"loss": [[1], [2.0]]})), spec, "quick") is None
    plt.close(figure)


def test_a_hill_needs_three_fixed_tau_and_says_where_its_top_is(spec):
    view = tidy(spec, made_up("quick", PAPERS)), spec, "quick"
    (axes,) = hill_figure(*view).axes
    said = axes.get_title(loc="left") or axes.get_title()
    assert said == "best fixed temperature: τ = 0.25, 84.0 %\nwithout a temperature (free): 85.0 %"
    assert len(hill_figure(tidy(spec, made_up("paper", PAPERS)), spec, "paper").axes) == 2  # the paper's beside ours
    assert hill_figure(tidy(spec, made_up("quick", {"0.1": 0.8, "1": 0.9, "free": 0.7})), spec, "quick") is None
    plt.close("all")


def test_a_label_leaves_out_what_all_settings_share(tmp_path):
    two = SPEC[:SPEC.index("paper:\n  runs")].replace("temperature: [0.1, 0.25, 0.5, 1, free]", "temperature: [0.1, "
                                                      "free]\n  lr: [1, 2]").replace("fixed: {lr: 1e-3}\n", "")
    for text, label in ((two, "τ = 0.1 · 2"), (two.replace("lr: [1, 2]", "lr: [2]"), "τ = 0.1")):
        (tmp_path / "madeup.yaml").write_text(text)
        view = View(tidy(spec := load_spec(tmp_path / "madeup.yaml"), []), spec, "quick")
        assert (setting_label(view, "0.1 · 2") == label
                and setting_command(view, "0.1 · 2").endswith("--set temperature=0.1 --set lr=2"))


def test_a_reduced_scale_says_that_the_paper_scale_was_not_run(spec):
    quick, said = made_up("quick", PAPERS), lambda rows: summary(tidy(spec, rows), spec, "quick")
    assert "The scale paper, 15 runs: not run." in said(quick)
    assert "not run" not in " ".join(said(quick + made_up("paper", {"0.5": 0.8})))


def test_a_spec_without_any_row_is_all_not_run(spec, tmp_path):
    html = report([spec], home=tmp_path, out=(out := StringIO())).read_text()
    said = out.getvalue()
    assert said.count("not run") == 10 and "0 of 15 runs stand in the ledger" in said and "reproduced" not in said
    assert "<img" not in html
    with pytest.raises(ValueError, match="no ledger in"): report(home=tmp_path)


def test_the_tsne_grid_comes_from_run_folders_and_else_from_the_last_picture(spec, tmp_path):
    rows = made_up("quick", PAPERS, seeds=2)
    for row in rows: Ledger("madeup", tmp_path).put(row)
    view = tidy(spec, rows), spec, "quick"
    assert tsne_figure(*view, tmp_path) is None
    assert "There is no t-SNE picture" in report([spec], home=tmp_path, out=StringIO()).read_text()
    for row in rows[::2]:
        (folder := tmp_path / "data" / "runs" / "madeup" / row["id"]).mkdir(parents=True)
        np.savez(folder / "embeddings.npz", labels=np.arange(20) % 4, embeddings=np.zeros((20, 3), "float16"),
                 tsne=np.random.default_rng(0).normal(size=(20, 2)).astype("float32"))
    titles = [ax.get_title(loc="left") + ax.get_title() for ax in tsne_figure(*view, tmp_path).axes]
    assert list(filter(None, titles)) == [f"{of}\ntop-1 {100 * mean - 0.5:.1f} %" for of, mean
                                          in zip(("τ = 0.1", "τ = 0.25", "τ = 0.5", "τ = 1", "free"), PAPERS.values())]
    page = report([spec], home=tmp_path, out=StringIO()).read_text()
    assert page.count("data:image/png") == 1 and not list((tmp_path / "figures").glob("*tsne.svg"))
    for row in rows[::2]: (tmp_path / "data" / "runs" / "madeup" / row["id"] / "embeddings.npz").unlink()
    assert report([spec], home=tmp_path, out=StringIO()).read_text() == page  # the picture that was drawn last

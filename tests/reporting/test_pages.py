"""Pages, sheets and tables with malicious names."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from markupsafe import Markup

from idml_jax.data.sources import FolderSource
from idml_jax.errors import UserError
from idml_jax.inference import search
from idml_jax.inference.store import Index
from idml_jax.ism import Metric
from idml_jax.metrics import retrieval
from idml_jax.metrics.embedded import Embedded, scores_of
from idml_jax.metrics.summary import retrieval_report
from idml_jax.reporting import answers, notes, open_set, page, plots, sections
from idml_jax.reporting import html as pages
from idml_jax.reporting.record import read_record
from idml_jax.training.config import default_config

HOSTILE = [
    "<span onmouseover=alert(1)>x",
    "<script>document.title='run'</script>",
    '"><img src=x onerror=document.title="run">',
    "'><svg onload=alert(1)>",
    "</title></style></td><script src=//x></script>",
    "<td>cell</td>",
    "$\\frac{$ $x^2$ ${",
    "{0} {} {{x}} %s %(x)d",
    "a\x1b[2J\x1b]0;owned\x07b",
    "b\u202egnp.exe\u2066",
    "two\nlines\x00",
    "_hidden&amp;&lt;",
    os.fsdecode(b"caf\xe9\xff"),
]
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "code", "b", "div", "span", "img",
    "figure", "figcaption", "br", "wbr", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "small",
}  # fmt: skip


class Reader(HTMLParser):
    """Collects the elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.shown = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.shown.append(data)


def check(text):
    """The text of a page, after checking that the page contains nothing active."""
    text.encode()
    assert not set(text) & set(map(chr, [*range(9), *range(11, 32), 127, 0x202E, 0x2066]))
    found = Reader(text)
    assert {tag for tag, _ in found.tags} <= TAGS
    for _, attributes in found.tags:
        assert set(attributes) <= {
            "class",
            "title",
            "src",
            "alt",
            "lang",
            "charset",
            "content",
            "name",
            "width",
            "open",
            "data-name",
            "http-equiv",
        }
        assert attributes.get("src", "data:image/").startswith("data:image/")
    metas = [a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(metas) == 1 and "default-src 'none'" in metas[0] and "script" not in metas[0]
    return "".join(found.shown)


def hostile_search():
    """Ten queries whose files and classes have such names, against themselves."""
    rng = np.random.default_rng(0)
    n = len(HOSTILE)
    embedded = Embedded(rng.normal(size=(2 * n, 4)).astype(np.float32), np.arange(2 * n) % n, rng.random((2 * n, 2)))
    index = Index(embedded, np.asarray(HOSTILE * 2, dtype=object), HOSTILE, {})
    own = np.arange(2 * n)
    return answers.records(index, index, search.search(embedded, embedded, 3, own=own), own)


def test_a_search_page(tmp_path):
    rows = hostile_search()
    pixels = lambda name: np.zeros((8, 8, 3), np.uint8)
    shown = check(answers.as_html(rows, pixels, pixels, HOSTILE[0]))
    assert "<script>document.title='run'</script>" in shown and "a\\x1b[2J" in shown and "caf\\xe9\\xff" in shown
    assert answers.as_png(rows[: len(HOSTILE)], pixels, lambda name: None)[:4] == b"\x89PNG"


def test_a_search_table():
    shown = answers.as_table(hostile_search())
    shown.encode()
    assert all(c.isprintable() or c == "\n" for c in shown) and "a\\x1b[2J" in shown
    assert len(shown.splitlines()) == 4 * 2 * len(HOSTILE)


@pytest.fixture
def seen(tmp_path):
    """What a report is made from, with hostile names everywhere: classes, files, settings, metrics."""
    rng = np.random.default_rng(0)
    n = len(HOSTILE)
    labels = np.repeat(np.arange(n), 3)
    cv2.imwrite(str(tmp_path / "x.png"), rng.integers(0, 256, (8, 8, 3), np.uint8))
    (tmp_path / "<img src=x onerror=alert(1)>.png").symlink_to(tmp_path / "x.png")
    source = FolderSource([str(tmp_path / "<img src=x onerror=alert(1)>.png")] * len(labels), labels, HOSTILE)
    embedded = Embedded(rng.normal(size=(len(labels), 4)).astype(np.float32), labels, rng.random((len(labels), 2)))
    own = np.arange(len(labels))
    found = retrieval.neighbours(embedded.semantic, embedded.semantic, 5, own=own)
    config = default_config()
    with config.unlocked():
        config.data.name = config.model.name = config.loss.name = HOSTILE[1]
    model = SimpleNamespace(config=config, introspective=True, metric=Metric(), step=3, workdir=tmp_path / HOSTILE[0])
    (tmp_path / "other").mkdir()
    best = {"R@1": 0.5, **{f"P(u_{name}>u)": 0.5 for name in HOSTILE}, **{name: 1.0 for name in HOSTILE}}
    best |= {"verification/EER": 0.25, **{f"verification/FNMR@{name}": 0.125 for name in HOSTILE}}
    (tmp_path / "other" / "result.json").write_text(json.dumps({"best": best, "untrained": {"R@1": "<script>"}}))
    (tmp_path / "other" / "config.json").write_text("{}")
    rows = [json.dumps({"step": i, "train/loss": 1.0, "eval/R@1": "<script>"}) for i in range(3)]
    (tmp_path / "other" / "metrics.jsonl").write_text("\n".join([*rows, "[]", "{", '{"step": "<script>"}']))
    history, result = read_record(tmp_path / "other", warning=lambda line: None)
    correct = labels[found.index[:, 0]] == labels
    scores = scores_of(embedded)
    figures = retrieval_report(embedded)
    return sections.Seen(
        model,
        source,
        source,
        embedded,
        embedded,
        found.index,
        found.distance,
        correct,
        scores,
        history,
        result,
        figures,
    )


def hostile_report(seen, tmp_path):
    """The page of a report, its parts drawn as the command draws them."""
    images = sections.Thumbnails(seen)
    other = tmp_path / "<script>"
    shutil.copytree(tmp_path / "other", other)
    parts = [part(seen, images) for name, part in sections.SECTIONS.items() if name != "map"]
    body = [sections.head(seen, images), page.comparison(seen, other), *parts]
    assert all(isinstance(part, Markup) for part in body)
    return pages.page(HOSTILE[4], body)


def test_a_report(seen, tmp_path):
    shown = check(hostile_report(seen, tmp_path))
    assert "EER 25.0 %" in str(shown)
    for text in (
        "</title></style></td><script src=//x></script>",
        "<span onmouseover=alert(1)>x",
        "{0} {} {{x}} %s %(x)d",
    ):
        assert text in shown
    assert "|u| rises" in shown and "Beside" in shown


def test_metrics_are_in_percent_and_explained_where_they_stand(seen):
    shown = sections.head(seen, sections.Thumbnails(seen))
    assert f"<b>{100 * seen.figures['R@1']:.1f} %</b>" in shown
    assert "Share of queries with an image of their class as the nearest." in shown
    assert "<small>Mean average precision over the R nearest" in shown
    table = pages.table(
        ["metric", "here"], [["R@1", notes.value_of("R@1", 0.125)], ["nll", notes.value_of("nll", 2.0)]]
    )
    assert '<td class="number" data-name="here">12.5 %</td>' in table and ">2.000<" in table
    assert notes.value_of("queries", 12.0) == 12 and notes.value_of("nothing", None) == "-"
    for section in ("knowing", "ambiguity", "strangers", "verification"):
        made = sections.SECTIONS[section](seen, sections.Thumbnails(seen))
        assert not re.search(r">0\.\d+<", made.replace('data-name="mean |u|">', "")), section


def test_right_and_wrong_are_told_by_a_sign_and_a_frame(seen):
    right, wrong, plain = (pages.tile(b"\x89PNG", ["x"], kind) for kind in ("right", "wrong", ""))
    assert "✓" in right and "✗" in wrong and 'class="sign"' not in plain
    assert "figure.wrong img { border: 4px dashed" in pages.STYLE
    made = sections.SECTIONS["answers"](seen, sections.Thumbnails(seen))
    assert made.count("✓") == made.count('<figure class="right"') + 1  # and the legend
    assert made.count("✗") == made.count('<figure class="wrong"') + 1


def test_the_legend_of_a_search_is_true_of_any_embeddings():
    vectors, classes = np.eye(8, 4, dtype=np.float32) + np.ones(4, np.float32), np.zeros(8, int)
    for scale, said in (
        (1.0, "to 2 (opposite) for normalised embeddings"),
        (20.0, "not normalised; from 0 (the same)"),
    ):
        embedded = Embedded(scale * vectors, classes)
        index = Index(embedded, np.asarray([f"/{row}.png" for row in range(8)]), ["a"], {})
        rows = answers.records(index, index, search.search(embedded, embedded, 3, own=np.arange(8)))
        made = check(answers.as_html(rows, lambda name: None, lambda name: None, ""))
        assert said in made and "than the second where fewer than ten" in made


def test_thumbnails_load_with_the_page_and_open_on_a_click():
    made = pages.tile(b"\x89PNG", ["x"])
    assert "loading" not in made and "<details><summary><img" in made
    assert "@media print" in pages.STYLE and "@media (max-width: 640px)" in pages.STYLE


def test_queries_without_an_answer_are_grouped_and_folded():
    rows = [dict(row, answered=i % 2 == 0) for i, row in enumerate(hostile_search() * 12)]
    for row in rows[1::2]:
        row.update(answer=None, neighbours=[], votes=[])
    pixels = lambda name: np.zeros((8, 8, 3), np.uint8)
    made = answers.as_html(rows, pixels, pixels, "")
    check(made)
    opened, *folded = made.split('<details class="fold">')
    assert opened.count('<div class="row">') == answers.OPEN and len(folded) == 3
    assert folded[0].startswith("<summary>Answered queries 61 to 120")
    none = folded[-1]
    assert f"<summary>{len(rows) // 2} queries have no answer" in none and '<div class="row">' not in none
    assert none.count('<figure class="query"') == len(rows) // 2 and opened.count('<figure class="query"') == 60


def test_runs_of_different_data_are_not_compared_without_a_word(seen, tmp_path):
    other = tmp_path / "other"
    for mine, its, said in (
        ({"images": 3, "files": "a"}, {"images": 3, "files": "a"}, None),
        (
            {"images": 3, "files": "a"},
            {"images": 4, "files": "b"},
            "tested on different images (3 images and 4 images)",
        ),
        (None, {"images": 4}, "the two runs differ in data.name"),
    ):
        seen.model.workdir.mkdir(exist_ok=True)
        for folder, record in ((seen.model.workdir, mine), (other, its)):
            (folder / "data.json").write_text(json.dumps({"test": record} if record else {}))
        shown = page.comparison(seen, other)
        assert (said in shown) if said else ("tested on different" not in shown), said
        assert "Settings that differ" in shown and "larger is better" in shown


def test_warnings_come_with_advice(seen):
    assert any("39 queries are few" in line for line in notes.warnings(seen))
    falls = seen._replace(result={"best": {"R@1": 0.9, "step": 5}, "final": {"R@1": 0.5}}, figures={"R@1": 0.9})
    assert any("fell from 90.0 % at step 5 to 50.0 %" in line and "Try fewer" in line for line in notes.warnings(falls))
    copies = seen.embedded._replace(uncertainty=1.5 * seen.embedded.semantic)
    assert any("copies" in line and "joined" in line for line in notes.warnings(seen._replace(embedded=copies)))
    gone = seen._replace(result={}, warnings=("changed",))
    assert notes.warnings(gone)[0] == "changed" and any("not finished" in line for line in notes.warnings(gone))


def test_only_the_type_makes_html():
    for value in HOSTILE:
        assert "<" not in pages.text(value)
        for made in (pages.table([value, value], [[value, 1.0]]), pages.cards([(value, value)]), pages.badge(value)):
            check(pages.page(value, [made]))
        check(pages.page("", [value, pages.html("<p>{} {x}</p>", value, x=value), pages.plot(b"\x89PNG", value)]))
        check(pages.page("", [pages.tile(b"", [value, value], "", value)]))
    assert pages.table(["a"], [[Markup("<b>x</b>")]]).count("<b>x</b>") == 1


def test_the_policy_lets_the_style_of_the_page_in():
    made = pages.page("x", [])
    style = re.search(r"<style>(.*?)</style>", made, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in made and "max-width: 1080px" in style


def test_plots_take_names_as_they_are():
    curve = ([0.0, 1.0], [0.0, 1.0])
    assert plots.matrix(np.eye(len(HOSTILE)), HOSTILE)[:4] == b"\x89PNG"
    assert plots.lines(("$\\frac{$", "$\\x$", {name: curve for name in HOSTILE}), "$\\y{$")[:4] == b"\x89PNG"
    assert plots.sheet([[(None, name, "query") for name in HOSTILE]])[:4] == b"\x89PNG"
    places = np.random.default_rng(0).normal(size=(26, 2))
    assert plots.plane_by_class(places, np.arange(26) % len(HOSTILE), HOSTILE)[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "content,message",
    [
        ('{"best": {"R@1": 0.5', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "holds list"),
        ('{"best": [1]}', "best is list"),
        ('{"untrained": 3}', "untrained is int"),
        (b"\xff\xfe", "cannot be read as text"),
    ],
)
def test_a_damaged_result_is_refused(tmp_path, content, message):
    path = tmp_path / "result.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"result.json: {message}"):
        read_record(tmp_path)


def test_damaged_rows_are_counted(tmp_path):
    told = []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.5, "b": null}\n7\n{"a": 1}\n{"step": 2, "a"')
    rows, result = read_record(tmp_path, told.append)
    assert rows == [{"step": 1, "a": 1.5}] and result == {}
    assert len(told) == 1 and "3 of 4 lines" in told[0]


def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_no_script_runs_in_a_browser(seen, tmp_path):
    text = hostile_report(seen, tmp_path)
    planted = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"></body>"
    (tmp_path / "as_it_is.html").write_text(text)
    (tmp_path / "escaping_failed.html").write_text(text.replace("</body>", planted))  # the policy alone
    (tmp_path / "without_policy.html").write_text(f"<title>x</title><body>{planted}")  # that the test can tell
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
    ]  # fmt: skip
    for name, ran in (("as_it_is", False), ("escaping_failed", False), ("without_policy", True)):
        address = (tmp_path / f"{name}.html").as_uri()
        done = subprocess.run([browser(), *flags, address], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "</html>" in done.stdout, done.stderr[-500:]
        assert ("<title>run</title>" in done.stdout) == ran, name


@pytest.mark.parametrize(
    ("answered", "right", "sentence"),
    [
        (0.0, None, "With a wanted precision of 90 %, none of these queries is answered."),
        (0.25, 0.914, "With a wanted precision of 90 %, 25 % of these queries are answered, 91.4 % of them rightly."),
    ],
)
def test_the_share_of_answers_among_strangers(answered, right, sentence):
    scores = {f"open_set/{name}(confidence)": 0.5 for name in ("AUROC", "AURC", "TPIR@0.1", "TPIR@0.01")}
    chosen = {"wanted_precision": 0.9, "open_set/answered": answered, "open_set/answered_precision": right}
    assert sentence in open_set.table(scores | chosen, {})

"""A self-contained page on which a person goes through proposed changes with the keyboard."""

import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from idml_jax.inference.audit import KINDS, Audit, Finding
from idml_jax.inference.corrections import COLUMNS, as_rows
from idml_jax.inference.index import Index
from idml_jax.reporting import html as pages
from idml_jax.reporting.answers import Reader, picture, tile

KEYS = (
    ("j", "next"),
    ("k", "previous"),
    ("a", "accept the change"),
    ("r", "reject it"),
    ("u", "undecided again"),
    ("n", "next undecided"),
    ("s", "save decisions.csv"),
)
# Decisions are kept by the browser, too, so that a closed page can be gone on with.
SCRIPT = """
const cards = [...document.querySelectorAll('[data-row]')];
const rows = cards.map(card => JSON.parse(card.dataset.row));
const columns = JSON.parse(document.body.querySelector('[data-columns]').dataset.columns);
const place = 'idml_jax audit ' + document.querySelector('[data-audit]').dataset.audit;
let at = 0, decided = {};
try { decided = JSON.parse(localStorage.getItem(place)) || {}; } catch (error) { decided = {}; }
function show(scroll) {
  cards.forEach((card, i) => {
    const decision = decided[rows[i].id] || '';
    card.className = 'finding ' + decision + (i === at ? ' here' : '');
    card.querySelector('.decision').textContent = decision || 'undecided';
  });
  const counts = ['accept', 'reject'].map(d => rows.filter(row => decided[row.id] === d).length);
  document.getElementById('state').textContent = counts[0] + ' accepted, ' + counts[1] + ' rejected, ' +
    (rows.length - counts[0] - counts[1]) + ' undecided';
  if (scroll && cards[at]) cards[at].scrollIntoView({block: 'center'});
}
function go(to) { at = Math.max(0, Math.min(cards.length - 1, to)); show(true); }
function decide(decision) {
  if (!cards.length) return;
  decided[rows[at].id] = decision;
  try { localStorage.setItem(place, JSON.stringify(decided)); } catch (error) { }
  decision ? go(at + 1) : show(false);
}
function save() {
  const quoted = value => '"' + String(value).replaceAll('"', '""') + '"';
  const lines = [columns, ...rows.map(row => columns.map(c => c === 'decision' ? decided[row.id] || '' : row[c]))];
  const text = lines.map(line => line.map(quoted).join(',')).join('\\n') + '\\n';
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'text/csv'}));
  link.download = 'decisions.csv';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
function undecided() {
  const order = rows.map((_, i) => (at + 1 + i) % rows.length);
  const next = order.find(i => !decided[rows[i].id]);
  if (next !== undefined) go(next);
}
const keys = {j: () => go(at + 1), ArrowRight: () => go(at + 1), k: () => go(at - 1), ArrowLeft: () => go(at - 1),
  a: () => decide('accept'), r: () => decide('reject'), u: () => decide(''), n: undecided, s: save};
document.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
const buttons = [...document.querySelectorAll('[data-key]')];
buttons.forEach(button => button.addEventListener('click', () => keys[button.dataset.key]()));
cards.forEach((card, i) => card.addEventListener('click', () => { at = i; show(false); }));
show(false);
"""


def sheet(index: Index, other: Index | None, found: Audit, readers: tuple[Reader, Reader], named: str) -> str:
    """The page.

    Args:
      index: the audited set.
      other: the other set, if there is one.
      found: the findings.
      readers: thumbnails of the images of both sets by name.
      named: name of the index, under which the browser keeps decisions.
    """
    rows = as_rows(index, found.findings)
    buttons = pages.join(
        (pages.html('<button data-key="{}"><b>{}</b> {}</button>', key, key, what) for key, what in KEYS), " "
    )
    body = [
        pages.html('<h1>{}</h1><p class="muted">{:,} images, {:,} findings</p>', named, len(index), len(rows)),
        Markup(
            "<p>Each finding is a proposed change: first the image (blue frame), then others that speak for it. Click "
            "a finding and press a key or a button; arrow keys go on and back. A click enlarges an image.</p>"
        ),
        pages.html(
            '<p class="bar"><span data-audit="{}" data-columns="{}">{}</span><br><b id="state"></b></p>',
            f"{named} {len(rows)} {sum(finding.row for finding in found.findings)}",
            json.dumps(COLUMNS),
            buttons,
        ),
        *(pages.html('<p class="muted small">{}</p>', note) for note in found.notes),
    ]
    kinds: set[str] = set()
    for row, finding in zip(rows, found.findings, strict=True):
        if finding.kind not in kinds:
            kinds.add(finding.kind)
            body.append(pages.html("<h2>{}: {}</h2>", finding.kind, KINDS[finding.kind]))
        body.append(_card(index, other, finding, row, readers))
    return pages.page(f"Audit of {named}", body, SCRIPT)


def _card(
    index: Index, other: Index | None, finding: Finding, row: dict[str, str], readers: tuple[Reader, Reader]
) -> Markup:
    change = f"{row['class']} → {row['proposed']}" if row["action"] == "relabel" else "remove"
    tiles = [_tile(readers[0], index, finding.row, [row["class"]], "query")]
    for beside in finding.beside:
        source = other if beside.other and other is not None else index
        lines = ([source.class_of(beside.row) or ""]) + (["other set"] if beside.other else [])
        tiles.append(_tile(readers[int(beside.other)], source, beside.row, lines, ""))
    head = pages.html(
        '<b>{}</b> <span class="badge decision">undecided</span> <span class="muted small">{}</span>',
        change,
        finding.reason,
    )
    return pages.html('<div class="finding" data-row="{}">{}{}</div>', json.dumps(row), head, pages.row(tiles))


def _tile(read: Reader, index: Index, row: int, lines: Sequence[str], kind: str) -> Markup:
    name = str(index.files[row])
    return tile(picture(read, name, index.box_of(row)), [*lines, Path(name).name], kind, index.name_of(row))

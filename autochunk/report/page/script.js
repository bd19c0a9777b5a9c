"use strict";

// Tables: a button in each head sorts by its column, numbers by data-value, empty ones last.
const valueOf = (row, column) => {
  const cell = row.cells[column];
  if (!("value" in cell.dataset)) return cell.textContent.trim();
  return cell.dataset.value === "" ? null : Number(cell.dataset.value);
};
const compare = (one, other) =>
  typeof one === "number" ? one - other : one.localeCompare(other, "en", { numeric: true });

const sortBy = (table, column) => {
  const head = table.tHead.rows[0].cells[column];
  const descending = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
  const known = rows.filter(([value]) => value !== null);
  known.sort(([one], [other]) => (descending ? compare(other, one) : compare(one, other)));
  const unknown = rows.filter(([value]) => value === null);
  table.tBodies[0].append(...[...known, ...unknown].map(([, row]) => row));
};

for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead button").forEach((button, column) => {
    button.addEventListener("click", () => sortBy(table, column));
  });
}

// Finding: all words must be in a row.
for (const input of document.querySelectorAll("input.find")) {
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      const details = document.getElementById(row.querySelector("a").hash.slice(1));
      details.hidden = row.hidden;
    }
    const shown = rows.filter((row) => !row.hidden).length;
    const status = input.closest(".tools").querySelector("[role=status]");
    status.textContent = `${shown} of ${rows.length} shown`;
  });
}

// A memory budget: the slider's place on the figure's axis; its right end is no budget. The choice
// is that of Python: the last step that the budget reaches.
const pickWithin = (moves, budgetMb) => {
  if (budgetMb === null) return moves.chosen;
  const step = moves.picks.findLast((one) => one.from_bytes <= budgetMb * 1e6);
  return step === undefined ? null : step.plan;
};

// Rounded, so that what is said is what is looked up.
const budgetOf = (moves, place) => {
  if (place >= 1000) return null;
  const bytes = moves.least * (moves.greatest / moves.least) ** (place / 1000);
  return Number((bytes / 1e6).toPrecision(3));
};

const show = (box, moves, budgetMb, place) => {
  const svg = box.closest("figure").querySelector("svg");
  const name = box.querySelector("input").id.replace(/slider$/, "");
  const pick = pickWithin(moves, budgetMb);
  for (const ring of svg.querySelectorAll(`[id^="${name}ring-"]`)) {
    ring.classList.toggle("picked", ring.id === `${name}ring-${pick}`);
  }
  const line = svg.getElementById(`${name}budget`);
  line.classList.toggle("picked", budgetMb !== null);
  line.setAttribute("transform", `translate(${(place / 1000) * moves.width} 0)`);
  const limit = budgetMb === null ? "no budget" : `memory_budget_mb=${budgetMb}`;
  const words = pick === null ? "nothing that was measured fits" : moves.plans[pick];
  box.querySelector("output").textContent = `${limit} → ${words}`;
  box.querySelector("input").setAttribute("aria-valuetext", `${limit}: ${words}`);
};

for (const box of document.querySelectorAll(".budget")) {
  const moves = JSON.parse(box.querySelector("script").textContent);
  const slider = box.querySelector("input");
  const update = () => show(box, moves, budgetOf(moves, slider.valueAsNumber), slider.valueAsNumber);
  slider.addEventListener("input", update);
  box.hidden = false;
  update();
}

// A link to a workload opens it; printing opens all.
const openTarget = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") {
    target.open = true;
    target.scrollIntoView();
  }
};
addEventListener("hashchange", openTarget);
openTarget();

let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const one of closed) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of closed) one.open = false;
});

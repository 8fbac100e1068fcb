"use strict";
const value = (cell) => {
  const text = cell.dataset.value ?? cell.textContent.trim();
  const number = Number(text);
  return text === "" ? -Infinity : Number.isNaN(number) ? text : number;
};
const compare = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1);

// Tables whose rows a click on a heading sorts.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(value(a.cells[column]), value(b.cells[column])) * (falling ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}

// Heatmaps, whose columns may be in the order of an expert's number, or of the scores of one layer or of each.
for (const map of document.querySelectorAll(".heat")) {
  const rows = [...map.querySelectorAll("tbody tr")];
  const cells = (row) => [...row.querySelectorAll("td")];
  const told = map.querySelector("output");
  const order = (key, text) => {
    for (const row of rows) {
      row.append(...cells(row).sort((a, b) => key(a) - key(b)));
    }
    told.textContent = text;
  };
  const expert = (cell) => Number(cell.textContent);
  const rank = (cell) => Number(cell.dataset.rank);
  map.querySelector(".orders").hidden = false;
  map.querySelector(".by-score").addEventListener("click", () => order(rank, "Each layer by its own falling score."));
  map.querySelector(".by-number").addEventListener("click", () => order(expert, "Every layer by the experts' numbers."));
  for (const row of rows) {
    const head = row.querySelector("th");
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const ranks = new Map(cells(row).map((cell) => [expert(cell), rank(cell)]));
      order((cell) => ranks.get(expert(cell)) ?? Number.MAX_SAFE_INTEGER, `Every layer by the scores of ${button.textContent}.`);
    });
  }
}

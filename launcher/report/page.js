// Sorting and filtering of the table of runs. Without this, the page has everything but these two.
"use strict";
{
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const count = document.getElementById("count");
  const input = document.getElementById("filter");
  const rows = [...body.rows];
  // What all rows share stands above the table, and is found in each of them all the same.
  const common = [...document.querySelectorAll("#common b")].map((one) => one.textContent.toLowerCase()).join(" ");
  let shown = rows.length;

  const key = (row, column) => {
    const cell = row.cells[column];
    const text = cell.textContent.trim().toLowerCase();
    return cell.dataset.v === undefined ? text : Number(cell.dataset.v);
  };

  // Rows without a number come last in both directions.
  const compare = (a, b, sign) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    if (a === "" || b === "") return (a === "") - (b === "");
    if (typeof a === "number") return sign * (a - b);
    return sign * a.localeCompare(b, "en", { numeric: true });
  };

  const say = (more) => {
    count.textContent = `${shown} of ${rows.length} rows${more}`;
  };

  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const name = head.textContent;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      // Numbers are first asked for with the largest on top.
      const first = head.classList.contains("n") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      for (const one of table.tHead.rows[0].cells) one.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const sorted = rows.map((row) => [key(row, column), row]);
      sorted.sort((a, b) => compare(a[0], b[0], sign));
      body.append(...sorted.map((pair) => pair[1]));
      say(`, sorted by ${name}, ${order}`);
    });
  });

  // A run whose row is hidden goes from charts, strips and tables, too.
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const hidden = new Set();
    shown = 0;
    for (const row of rows) {
      const text = `${row.textContent.toLowerCase()} ${common}`;
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
      if (row.hidden && row.dataset.run) hidden.add(row.dataset.run);
    }
    for (const part of document.querySelectorAll("[data-run]")) {
      if (body.contains(part)) continue;
      part.toggleAttribute("hidden", hidden.has(part.dataset.run));
    }
    say("");
  };

  input.addEventListener("input", filter);
  input.closest("p").hidden = false;
  filter(); // a browser that goes back to the page fills the field in again
}

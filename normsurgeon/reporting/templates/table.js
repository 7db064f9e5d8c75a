// The layer table: sorted by the buttons of its header, filtered by name, class and kind.
(() => {
  "use strict";
  const table = document.getElementById("layer-table");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const box = document.getElementById("layer-filter");
  const kind = document.getElementById("layer-kind");
  const names = new Intl.Collator("en", { numeric: true });

  // A cell's number, or its text; null where there is no value: those stay last in both directions.
  const value = (row, column) => {
    const cell = row.cells[column];
    const number = cell.dataset.value;
    return number === undefined ? cell.textContent : number === "" ? null : Number(number);
  };

  const sort = (column) => {
    const head = heads[column];
    const numeric = head.classList.contains("num");
    const first = numeric ? "descending" : "ascending";
    const other = numeric ? "ascending" : "descending";
    // First click, second click, and the third gives the network's order back.
    const now = head.getAttribute("aria-sort");
    const next = now === "none" ? first : now === first ? other : "none";
    heads.forEach((h) => h.setAttribute("aria-sort", h === head ? next : "none"));
    const sign = next === "ascending" ? 1 : -1;
    const ordered = next === "none" ? rows : rows.slice().sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (typeof x === "number" ? x - y : names.compare(x, y));
    });
    body.append(...ordered);
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(column)));

  const filter = () => {
    const words = box.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = [row.cells[0], ...row.querySelectorAll("td:not(.num)")].map((c) => c.textContent).join(" ");
      const fits = words.every((word) => text.toLowerCase().includes(word)) &&
        (!kind || !kind.value || row.dataset.kind === kind.value);
      row.hidden = !fits;
      shown += fits;
    }
    document.getElementById("layer-count").textContent = `${shown} of ${rows.length} ${table.dataset.rows || "layers"}`;
  };
  box.addEventListener("input", filter);
  if (kind) kind.addEventListener("change", filter);
  box.form.addEventListener("submit", (event) => event.preventDefault());
})();

// Searchable tables: sorted by the buttons of their header, filtered by words and by the values of a column.
for (const table of document.querySelectorAll("table.searchable")) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const form = table.closest(".panel").querySelector("form");
  const [box, choice] = [form.querySelector("input"), form.querySelector("select")];
  const chosen = heads.findIndex((head) => head.textContent.trim() === table.dataset.select);
  const names = new Intl.Collator("en", { numeric: true });

  // A cell's number, or its text; null where there is no value: those stay last in both directions.
  const value = (row, column) => {
    const { dataset, textContent } = row.cells[column];
    return dataset.value === undefined ? textContent : dataset.value === "" ? null : Number(dataset.value);
  };

  const sort = (head, column) => {
    const [first, other] = head.classList.contains("num") ? ["descending", "ascending"] : ["ascending", "descending"];
    // First click, second click, and the third gives the first order back.
    const now = head.getAttribute("aria-sort");
    const next = now === "none" ? first : now === first ? other : "none";
    heads.forEach((each) => each.setAttribute("aria-sort", each === head ? next : "none"));
    const sign = next === "ascending" ? 1 : -1;
    const ordered = next === "none" ? rows : rows.slice().sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (typeof x === "number" ? x - y : names.compare(x, y));
    });
    body.append(...ordered);
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(head, column)));

  const filter = () => {
    const words = box.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = [row.cells[0], ...row.querySelectorAll("td:not(.num)")].map((cell) => cell.textContent).join(" ");
      const fits = !choice || !choice.value || row.cells[chosen].textContent === choice.value;
      row.hidden = !fits || !words.every((word) => text.toLowerCase().includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    form.querySelector("output").textContent = `${shown} of ${rows.length} ${table.dataset.noun}`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
}

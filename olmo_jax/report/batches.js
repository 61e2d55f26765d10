// Leaves only the rows that have what is looked for. The page is whole without it.
const search = document.querySelector("#search");
const count = document.querySelector("#count");
const rows = [...document.querySelectorAll("article")];
search.hidden = false;

search.addEventListener("input", () => {
  const wanted = search.value.toLowerCase();
  let found = 0;
  for (const row of rows) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
    found += !row.hidden;
  }
  for (const step of document.querySelectorAll("details")) {
    const any = step.querySelector("article:not([hidden])") !== null;
    step.hidden = !any;
    if (wanted && any) step.open = true;
  }
  count.textContent = wanted ? `${found} of ${rows.length} rows` : "";
});

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});

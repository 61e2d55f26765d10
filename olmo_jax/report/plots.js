// Shows the values under the pointer in a plot's caption. The page is whole without it.
for (const figure of document.querySelectorAll("figure.plot")) {
  const plot = JSON.parse(figure.dataset.plot);
  const svg = figure.querySelector("svg");
  const cursor = figure.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const newest = readout.textContent;

  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return step - steps[low] < steps[high] - step ? low : high;
  };

  const show = (event) => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const share = Math.min(1, Math.max(0, (x - plot.left) / (plot.right - plot.left)));
    const found = plot.curves.map((curve) => {
      const at = nearest(curve.steps, plot.first + share * (plot.last - plot.first));
      return { ...curve, step: curve.steps[at], value: curve.text[at] };
    });
    const step = found[0].step;
    const position = plot.left + ((step - plot.first) / (plot.last - plot.first)) * (plot.right - plot.left);
    cursor.setAttribute("x1", position);
    cursor.setAttribute("x2", position);
    cursor.style.visibility = "visible";
    const name = plot.names ? plot.names[step] : `step ${step.toLocaleString("en")}`;
    readout.textContent = `${name} · ` +
      found.map((curve) => (found.length > 1 ? `${curve.label} ${curve.value}` : curve.value)).join(" · ");
  };

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    readout.textContent = newest;
  });
}

// Paper has no way to unfold.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});

// The values at the pointer; without it each curve shows its last.
for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector("svg"), { x, y, log } = JSON.parse(svg.dataset.scale);
  const rule = svg.querySelector(".rule"), step = figure.querySelector("h3 small");
  const outputs = [...figure.querySelectorAll("output")], last = outputs.map(output => output.textContent);
  const curves = [...svg.querySelectorAll(".line")].map(path =>
    [...path.getAttribute("d").matchAll(/([\d.]+) ([\d.]+)/g)].map(([, px, py]) => [+px, +py]));
  const invert = (p, [low, high, from, to]) => low + (p - from) / (to - from) * (high - low);
  svg.onpointermove = event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const near = curves.map(points => points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    near.forEach(([, py], i) => {
      const value = log ? 10 ** invert(py, y) : invert(py, y);
      outputs[i].textContent = value >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(4);
    });
    step.textContent = "step " + Math.round(invert(near[0][0], x)).toLocaleString("en");
    rule.setAttribute("d", `M${near[0][0]} ${y[3]}V${y[2]}`);
  };
  svg.onpointerleave = () => {
    outputs.forEach((output, i) => output.textContent = last[i]);
    step.textContent = "";
    rule.setAttribute("d", "");
  };
}

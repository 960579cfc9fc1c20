// Redraws every chart so that it responds to mouse, touch and keyboard, and fits into a narrow window. Until
// then, and without scripts, the page shows the static drawing that was made with the report.
const isTouch = matchMedia("(hover: none)").matches;

// Calls `change` with every object inside `value`, from the outside to the inside.
function walk(value, change) {
  if (value === null || typeof value !== "object") return;
  if (!Array.isArray(value)) change(value);
  Object.values(value).forEach((inner) => walk(inner, change));
}

// In two lines, broken near the middle.
function broken(text) {
  const at = text.indexOf(" ", text.length / 2 - 4);
  return at < 0 ? text : [text.slice(0, at), text.slice(at + 1)];
}

// Changes a chart for a window of `room` pixels: panels below each other, short labels, one legend entry a line.
function narrow(spec, room) {
  const isFacet = "spec" in spec;
  const plot = isFacet ? spec.spec : spec;
  const names = isFacet ? 70 : 100;
  const ends = isFacet ? 24 : 88;
  const wide = plot.width;
  plot.width = Math.max(120, room - names - ends);
  if (isFacet) spec.columns = 1;
  // What stands to the right of each run is in its tooltip too.
  plot.layer = plot.layer.filter((layer) => layer.encoding?.text?.field !== "note");
  walk(plot.layer, (part) => {
    if (part.value === wide) part.value = plot.width;
    if (part.labelLimit) part.labelLimit = names - 12;
    if (part.tickCount > 4) part.tickCount = 4;
    if (part.x && typeof part.x.title === "string" && part.x.title.length > 24) part.x.title = broken(part.x.title);
  });
  spec.config.legend.columns = 1;
  spec.config.padding = 2;
}

document.querySelectorAll("figure.chart").forEach((figure) => {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const room = figure.clientWidth;
  if (room < 480) narrow(spec, room);
  // On a touch screen a tap shows the tooltip; a link would leave the page first.
  if (isTouch) walk(spec, (part) => delete part.href);
  const live = document.createElement("div");
  // A finger never hovers: what the mouse does above a point follows its tap.
  if (isTouch) live.addEventListener("click", (tap) => tap.target.dispatchEvent(new PointerEvent("pointermove", tap)));
  const options = { renderer: "svg", actions: false, tooltip: { theme: "page" } };
  vegaEmbed(live, spec, options)
    .then(() => figure.querySelector("div").replaceWith(live))
    .catch((error) => console.error(error));
});

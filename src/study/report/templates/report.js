// Draws every chart again so that it answers to mouse and keyboard. Until then, and where scripts do
// not run, the page shows the same chart as it was drawn when the report was written.
document.querySelectorAll("figure.chart").forEach((figure) => {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const live = document.createElement("div");
  const options = { renderer: "svg", actions: false, tooltip: { theme: "page" } };
  vegaEmbed(live, spec, options)
    .then(() => figure.querySelector("div").replaceWith(live))
    .catch((error) => console.error(error));
});

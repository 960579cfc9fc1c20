// Redraws every chart so that it responds to mouse and keyboard. Until then, and without scripts, the page
// shows the static drawing that was made with the report.
document.querySelectorAll("figure.chart").forEach((figure) => {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const live = document.createElement("div");
  const options = { renderer: "svg", actions: false, tooltip: { theme: "page" } };
  vegaEmbed(live, spec, options)
    .then(() => figure.querySelector("div").replaceWith(live))
    .catch((error) => console.error(error));
});

//! The throughput as a picture: a pair of bars for each size of batch.

use super::{arguments::Store, matrix::Cell};

const WIDTH: f64 = 720.0;
const GROUP_HEIGHT: f64 = 46.0;
const BAR_HEIGHT: f64 = 15.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 110.0;
const TOP: f64 = 52.0;

/// The cells with the number of connections that most devices share, one group each.
pub fn draw(cells: &[Cell]) -> String {
    let connections = if cells.iter().any(|cell| cell.connections == 100) { 100 } else { cells.first().map_or(0, |cell| cell.connections) };
    let shown: Vec<&Cell> = cells.iter().filter(|cell| cell.connections == connections).collect();
    let rate_max = shown.iter().map(|cell| cell.gateway.rate.max(cell.reference.rate)).fold(1.0, f64::max);
    let height = TOP + GROUP_HEIGHT * shown.len() as f64 + 8.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\" role=\"img\">\n\
         <title>Acknowledged readings per second: the gateway beside a null sink</title>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"22\" font-weight=\"bold\">Acknowledged readings per second, {connections} connections</text>\n\
         <text x=\"12\" y=\"40\" fill=\"#555\">dark: stored durably; light: the same server, which throws them away</text>\n"
    );
    for (index, cell) in shown.iter().enumerate() {
        svg += &group(cell, TOP + GROUP_HEIGHT * index as f64, rate_max);
    }
    svg + "</svg>\n"
}

fn group(cell: &Cell, y: f64, rate_max: f64) -> String {
    let colour = match cell.store {
        Store::Sqlite => "#0b7285",
        Store::Postgres => "#364fc7",
    };
    let bar = |y: f64, rate: f64, colour: &str, label: String| {
        let width = (WIDTH - LEFT - RIGHT) * rate / rate_max;
        format!(
            "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{colour}\"/>\n<text x=\"{:.1}\" y=\"{:.1}\">{label}</text>\n",
            LEFT + width + 6.0,
            y + 12.0
        )
    };
    let name = format!("{}, batch {}", cell.store.name(), cell.batch);
    let ours = format!("{:.2} M ({:.0} %)", cell.gateway.rate / 1e6, cell.ratio * 100.0);
    let theirs = format!("{:.2} M", cell.reference.rate / 1e6);
    format!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>\n", LEFT - 10.0, y + 19.0)
        + &bar(y, cell.gateway.rate, colour, ours)
        + &bar(y + BAR_HEIGHT + 2.0, cell.reference.rate, "#ced4da", theirs)
}

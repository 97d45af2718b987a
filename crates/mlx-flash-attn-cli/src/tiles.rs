//! `tiles`: a picture of the score matrix.

use anyhow::Result;
use mlx_flash_attn::attention::class_tile;
use mlx_flash_attn::attention::{QueryOffset, TileClass, Visibility};

use crate::cli::TilesArgs;
use crate::files::Target;
use crate::grid::{Counts, Grid};
use crate::json::TilesLine;
use crate::output::{Results, Status, message};
use crate::score;
use crate::svg::{Anchor, Svg};
use crate::table::Table;

/// Most characters of the picture, down and across.
const TEXT: (usize, usize) = (40, 96);
/// Most cells of the drawing, down and across.
const DRAWN: (usize, usize) = (128, 128);

const CLASSES: [(TileClass, char, &str, &str, &str); 3] = [
    (
        TileClass::Skip,
        '.',
        "skip",
        "skipped",
        "neither loaded nor computed",
    ),
    (
        TileClass::Mixed,
        '+',
        "mixed",
        "masked",
        "computed, some scores masked",
    ),
    (
        TileClass::Free,
        '#',
        "free",
        "free",
        "computed, no mask needed",
    ),
];

pub(crate) fn execute(args: &TilesArgs, results: &mut Results) -> Result<Status> {
    let target = args
        .svg
        .as_ref()
        .map(|path| Target::new(path, &[]))
        .transpose()?;
    let bounded = args.causal || args.window.is_some() || args.window_right.is_some();
    let offset = score::offset(args.q_offset, bounded, [(args.sq, args.sk)])?;
    let grid = Grid {
        visibility: Visibility {
            q_offset: match offset {
                QueryOffset::At(offset) => offset,
                QueryOffset::BottomRight => args.sk as i64 - args.sq as i64,
            },
            causal: args.causal,
            window: args.window,
            window_right: args.window_right,
        },
        tile: class_tile(args.head_dim),
        query_len: args.sq,
        key_len: args.sk,
    };
    let title = title(args, &grid);
    let cell = Cell::new(&grid, TEXT);
    let cells = grid.cells(cell.down, cell.across);
    let counts = cells
        .iter()
        .flatten()
        .fold(Counts::default(), |a, b| Counts {
            skip: a.skip + b.skip,
            mixed: a.mixed + b.mixed,
            free: a.free + b.free,
        });
    if args.json {
        results.json(&line(args, &grid, &counts))?;
    } else {
        results.line(&title)?;
        results.line(cell.describe("character"))?;
        results.line("")?;
        for row in &cells {
            results.line(row.iter().map(character).collect::<String>())?;
        }
        results.line("")?;
        results.text(&legend(&counts).to_string())?;
        results.line(format_args!(
            "\nwork saved: {}",
            percent(counts.skip, &counts)
        ))?;
    }
    if let Some(target) = target {
        let cell = Cell::new(&grid, DRAWN);
        let cells = grid.cells(cell.down, cell.across);
        target.write(draw(&title, &grid, &cell, &cells, &counts).as_bytes())?;
    }
    if counts.skip == counts.total() {
        message(format_args!("note: no query sees a key"));
    }
    Ok(Status::Done)
}

fn line(args: &TilesArgs, grid: &Grid, counts: &Counts) -> TilesLine {
    TilesLine {
        sq: args.sq,
        sk: args.sk,
        causal: args.causal,
        window: args.window,
        window_right: args.window_right,
        q_offset: grid.visibility.q_offset,
        head_dim: args.head_dim,
        tile: [grid.tile.bq, grid.tile.bk],
        skipped: counts.skip,
        masked: counts.mixed,
        free: counts.free,
        saved: counts.skip as f64 / counts.total().max(1) as f64,
    }
}

fn title(args: &TilesArgs, grid: &Grid) -> String {
    let (down, across) = grid.tiles();
    let mut title = format!(
        "{} queries x {} keys, {down} x {across} tiles of {} x {}",
        args.sq, args.sk, grid.tile.bq, grid.tile.bk
    );
    if args.causal {
        title.push_str(", causal");
    }
    if let Some(window) = args.window {
        title.push_str(&format!(", window {window}"));
    }
    if let Some(keys) = args.window_right {
        title.push_str(&format!(", {keys} to the right"));
    }
    if grid.visibility.q_offset != 0 {
        title.push_str(&format!(", offset {}", grid.visibility.q_offset));
    }
    title
}

/// How many tiles one cell of a picture stands for.
struct Cell {
    down: usize,
    across: usize,
}

impl Cell {
    fn new(grid: &Grid, (rows, columns): (usize, usize)) -> Self {
        let (down, across) = grid.tiles();
        Self {
            down: down.div_ceil(rows),
            across: across.div_ceil(columns),
        }
    }

    fn describe(&self, cell: &str) -> String {
        match (self.down, self.across) {
            (1, 1) => format!("one {cell} a tile"),
            (down, across) => {
                format!("one {cell} for {down} x {across} tiles, masked where they differ")
            }
        }
    }
}

fn character(counts: &Counts) -> char {
    let class = counts.class();
    CLASSES
        .iter()
        .find(|(c, ..)| *c == class)
        .map_or('?', |(_, character, ..)| *character)
}

fn of(class: TileClass, counts: &Counts) -> u64 {
    match class {
        TileClass::Skip => counts.skip,
        TileClass::Mixed => counts.mixed,
        TileClass::Free => counts.free,
    }
}

fn percent(tiles: u64, counts: &Counts) -> String {
    format!(
        "{:.1} %",
        100.0 * tiles as f64 / counts.total().max(1) as f64
    )
}

fn legend(counts: &Counts) -> Table {
    let mut table = Table::default();
    for (class, character, _, name, meaning) in CLASSES {
        let tiles = of(class, counts);
        table.row([
            format!("{character}  {name:<7}  {meaning}"),
            tiles.to_string(),
            percent(tiles, counts),
        ]);
    }
    table
}

fn draw(title: &str, grid: &Grid, cell: &Cell, cells: &[Vec<Counts>], counts: &Counts) -> String {
    let columns = cells.first().map_or(1, Vec::len).max(1);
    // Tiles keep their proportions where the picture stays readable.
    let aspect = (grid.query_len as f64 / grid.key_len as f64).clamp(0.1, 1.0);
    let (left, top, width) = (84.0, 84.0, 560.0);
    let height = (width * aspect).max(40.0);
    let (w, h) = (width / columns as f64, height / cells.len().max(1) as f64);
    let bottom = top + height;
    let mut svg = Svg::new(left + width + 40.0, bottom + 128.0, title);
    svg.text("soft", 16.0, 48.0, Anchor::Start, &cell.describe("cell"));
    svg.text("soft", left, top - 10.0, Anchor::Start, "key 0");
    let last = |n: usize| (n - 1).to_string();
    let (last_key, last_query) = (last(grid.key_len), last(grid.query_len));
    svg.text("soft", left + width, top - 10.0, Anchor::End, &last_key);
    svg.text("soft", left - 8.0, top + 10.0, Anchor::End, "query 0");
    svg.text("soft", left - 8.0, bottom, Anchor::End, &last_query);
    for (r, row) in cells.iter().enumerate() {
        let mut c = 0;
        // Neighbours of one class are one rectangle.
        for run in row.chunk_by(|a, b| a.class() == b.class()) {
            let class = run.first().map_or(TileClass::Skip, Counts::class);
            let name = CLASSES.iter().find(|(k, ..)| *k == class);
            let name = name.map_or("", |(_, _, name, ..)| name);
            let (x, y) = (left + c as f64 * w, top + r as f64 * h);
            svg.rect(name, x, y, run.len() as f64 * w, h);
            c += run.len();
        }
    }
    for (i, (class, _, name, label, meaning)) in CLASSES.into_iter().enumerate() {
        let y = bottom + 20.0 + 24.0 * i as f64;
        let tiles = of(class, counts);
        let share = percent(tiles, counts);
        svg.rect(name, left, y, 16.0, 16.0);
        let text = format!("{label}: {tiles} tiles, {share}; {meaning}");
        svg.text("", left + 26.0, y + 13.0, Anchor::Start, &text);
    }
    let saved = format!("work saved: {}", percent(counts.skip, counts));
    svg.text("", left, bottom + 110.0, Anchor::Start, &saved);
    svg.finish()
}

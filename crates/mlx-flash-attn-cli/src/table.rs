//! Text tables for people.

use std::fmt;

/// Rows of cells under a header: the first column to the left, the others to the right.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    header: bool,
}

impl Table {
    /// A table with a header.
    pub(crate) fn new<S: Into<String>>(header: impl IntoIterator<Item = S>) -> Self {
        let mut table = Self::default();
        table.row(header);
        table.header = true;
        table
    }

    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|c| {
                self.rows
                    .iter()
                    .filter_map(move |r| r.get(c))
                    .map(|s| width(s))
            })
            .map(|widths| widths.max().unwrap_or(0))
            .collect();
        for (i, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (c, (cell, width)) in row.iter().zip(&widths).enumerate() {
                match c {
                    0 => line.push_str(&format!("{cell:<width$}")),
                    _ => line.push_str(&format!("  {cell:>width$}")),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
            if i == 0 && self.header {
                let rule = widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1);
                writeln!(f, "{}", "-".repeat(rule))?;
            }
        }
        Ok(())
    }
}

/// Names and values, a line each.
#[derive(Debug, Default)]
pub(crate) struct Fields(Vec<(String, String)>);

impl Fields {
    pub(crate) fn add(&mut self, name: &str, value: impl fmt::Display) {
        self.0.push((name.into(), value.to_string()));
    }
}

impl fmt::Display for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name_width = self.0.iter().map(|(n, _)| width(n)).max().unwrap_or(0);
        for (name, value) in &self.0 {
            writeln!(f, "{name:<name_width$}  {value}")?;
        }
        Ok(())
    }
}

/// A time in its natural unit.
pub(crate) fn milliseconds(ms: f64) -> String {
    if ms >= 10_000.0 {
        format!("{:.1} s", ms / 1e3)
    } else if ms >= 100.0 {
        format!("{ms:.0} ms")
    } else if ms >= 1.0 {
        format!("{ms:.2} ms")
    } else {
        format!("{:.1} µs", ms * 1e3)
    }
}

/// A positive number with three significant digits.
pub(crate) fn significant(x: f64) -> String {
    let decimals = (2.0 - x.log10().floor().clamp(-9.0, 2.0)) as usize;
    format!("{x:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["shape", "ms"]);
        table.row(["1,2", "3.5"]);
        table.row(["a long one", "10"]);
        let expected = "shape        ms\n---------------\n1,2         3.5\na long one   10\n";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn three_digits() {
        let all = [0.000_212_34, 0.0567, 1.2345, 45.678, 987.6].map(significant);
        assert_eq!(all, ["0.000212", "0.0567", "1.23", "45.7", "988"]);
    }

    #[test]
    fn names_line_up() {
        let mut fields = Fields::default();
        fields.add("device", "CPU");
        fields.add("time", milliseconds(0.5));
        assert_eq!(fields.to_string(), "device  CPU\ntime    500.0 µs\n");
    }
}

//! Tables for people, JSON for programs.

use std::io::{self, Write};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::failure::Failure;
use penstock_api::http::Progress;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    Table,
    Json,
}

/// Writes to standard output.
pub fn emit(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::Closed,
        _ => Failure::Output(error),
    })
}

pub fn show<T: Serialize + ?Sized>(form: Form, value: &T, table: impl FnOnce(&T) -> String) -> Result<(), Failure> {
    match form {
        Form::Table => emit(&table(value)),
        Form::Json => emit(&serde_json::to_string_pretty(value).map_err(|error| Failure::Garbled(error.to_string()))?),
    }
}

/// A table with the columns of `right` (counted from 0) aligned to the right.
pub fn table(header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header.to_vec());
    table.add_rows(rows);
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Two columns: what, and its value.
pub fn facts(rows: Vec<(&str, String)>) -> String {
    let width = rows.iter().map(|(what, _)| what.len()).max().unwrap_or(0);
    rows.into_iter().map(|(what, value)| format!("{what:width$}  {value}\n")).collect()
}

/// A progress in one line.
pub fn progress(progress: &Progress) -> String {
    match progress {
        Progress::Settled => progress.word().to_owned(),
        Progress::Pending { reason } | Progress::Removing { reason } => format!("{}: {reason}", progress.word()),
        Progress::Refused { message, .. } => format!("{}: {message}", progress.word()),
    }
}

/// What is to be done about those that are refused, a line for each that is not said yet.
pub fn hints<'a>(all: impl Iterator<Item = &'a Progress>) -> String {
    let mut said: Vec<&str> = Vec::new();
    for progress in all {
        if let Progress::Refused { hint: Some(hint), .. } = progress
            && !said.contains(&hint.as_str())
        {
            said.push(hint);
        }
    }
    said.into_iter().map(|hint| format!("hint: {hint}\n")).collect()
}

pub fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_aligns_and_leaves_no_trailing_space() {
        let text = table(&["NAME", "SIZE"], &[1], vec![vec!["a".into(), "1 GiB".into()], vec!["bb".into(), "10 GiB".into()]]);
        assert_eq!(text, "NAME    SIZE\na      1 GiB\nbb    10 GiB\n");
        assert_eq!(facts(vec![("a", "1".into()), ("bbb", "2".into())]), "a    1\nbbb  2\n");
    }

    #[test]
    fn hints_are_of_what_is_refused_and_said_once() {
        let refused = |hint: Option<&str>| Progress::Refused {
            code: penstock_api::rpc::ErrorCode::NotFound,
            message: "gone".to_owned(),
            hint: hint.map(str::to_owned),
        };
        let all = [refused(Some("a")), Progress::Settled, refused(None), refused(Some("b")), refused(Some("a"))];
        assert_eq!(hints(all.iter()), "hint: a\nhint: b\n");
    }
}

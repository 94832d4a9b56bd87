//! What a person types or pipes in: a MESSAGE argument, and answers to questions.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Cursor, IsTerminal as _, Read, Write as _};
use std::path::Path;

use serde_json::value::RawValue;

use super::error::CliError;

/// Longest single message that is read, in bytes. The router's own limit is mostly lower and has its own answer.
const MESSAGE_BYTES_MAX: u64 = 64 << 20;

/// Bytes read at once from a file or stdin.
const READ_BYTES: usize = 1 << 20;

/// A file or stdin, open.
pub(crate) struct Input {
    /// What comes.
    pub(crate) reader: BufReader<Box<dyn Read + Send>>,
    /// How long it is, where that is known.
    pub(crate) bytes: Option<u64>,
}

/// What a MESSAGE argument turned out to be.
pub(crate) enum Given {
    /// One JSON value.
    One(Box<RawValue>),
    /// Newline-delimited JSON.
    Lines(Input),
}

/// Whether `argument` names stdin (`-`) or a file (`@file`) rather than being the message itself.
pub(crate) fn is_elsewhere(argument: &str) -> bool {
    argument == "-" || argument.starts_with('@')
}

/// Opens what `-` or `@file` names.
///
/// # Errors
/// When the file cannot be opened.
pub(crate) fn open(argument: &str) -> Result<Input, CliError> {
    let Some(path) = argument.strip_prefix('@') else {
        if io::stdin().is_terminal() {
            // Best effort, for a person who wonders why nothing happens.
            let _ = writeln!(io::stderr(), "reading from the keyboard; end with Ctrl-D");
        }
        return Ok(Input { reader: BufReader::with_capacity(READ_BYTES, Box::new(io::stdin())), bytes: None });
    };
    let cannot = |error: io::Error| CliError::failed(format!("cannot read {path}: {error}"));
    let file = File::open(path).map_err(cannot)?;
    let metadata = file.metadata().map_err(cannot)?;
    if metadata.is_dir() {
        return Err(CliError::failed(format!("cannot read {path}: it is a directory")));
    }
    let bytes = metadata.is_file().then_some(metadata.len());
    Ok(Input { reader: BufReader::with_capacity(READ_BYTES, Box::new(file)), bytes })
}

/// Reads a MESSAGE argument: JSON as it is, anything else as a JSON string (`text_only`: always as a string). Stdin
/// or a file is newline-delimited JSON when its first line is a whole JSON value and more lines follow, or when it is
/// named so.
///
/// # Errors
/// When it cannot be read, is too long, or is not UTF-8.
pub(crate) fn message(argument: &str, text_only: bool) -> Result<Given, CliError> {
    if !is_elsewhere(argument) {
        return Ok(Given::One(to_json(argument, text_only)?));
    }
    let input = open(argument)?;
    if text_only {
        return Ok(Given::One(to_json(&whole(input.reader)?, true)?));
    }
    let extension = Path::new(argument).extension().and_then(|extension| extension.to_str());
    if argument != "-" && matches!(extension, Some("ndjson" | "jsonl")) {
        return Ok(Given::Lines(input));
    }
    tell_apart(input)
}

/// Whether `input` is one value or many lines. Reads no further than to the second line that is not empty.
fn tell_apart(mut input: Input) -> Result<Given, CliError> {
    let mut head = Vec::new();
    let first = next_line(&mut input.reader, &mut head)?;
    let is_value = first.is_some_and(|first| serde_json::from_slice::<&RawValue>(&head[first..]).is_ok());
    let many = is_value && next_line(&mut input.reader, &mut head)?.is_some();
    let reader: Box<dyn Read + Send> = Box::new(Cursor::new(head).chain(input.reader));
    let reader = BufReader::with_capacity(READ_BYTES, reader);
    if many {
        Ok(Given::Lines(Input { reader, bytes: input.bytes }))
    } else {
        Ok(Given::One(to_json(&whole(reader)?, false)?))
    }
}

/// Appends lines to `head` until one is not blank; where that one starts, or `None` at the end.
fn next_line(reader: &mut BufReader<Box<dyn Read + Send>>, head: &mut Vec<u8>) -> Result<Option<usize>, CliError> {
    loop {
        let start = head.len();
        let room = MESSAGE_BYTES_MAX.saturating_sub(start as u64);
        let read = reader.by_ref().take(room).read_until(b'\n', head).map_err(unreadable)?;
        if read == 0 {
            return Ok(None);
        }
        if !head[start..].trim_ascii().is_empty() {
            return Ok(Some(start));
        }
    }
}

fn whole(reader: impl Read) -> Result<String, CliError> {
    let mut bytes = Vec::new();
    reader.take(MESSAGE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MESSAGE_BYTES_MAX {
        return Err(CliError::failed(format!(
            "the message is longer than {} MiB; send a reference to it instead",
            MESSAGE_BYTES_MAX >> 20
        )));
    }
    String::from_utf8(bytes)
        .map_err(|_| CliError::failed("the message is not UTF-8; JSON cannot carry it: encode it, as by `base64`"))
}

fn unreadable(error: io::Error) -> CliError {
    CliError::failed(format!("cannot read the message: {error}"))
}

/// JSON as it is, byte for byte; anything else as a JSON string, without the line break that `echo` adds.
fn to_json(text: &str, text_only: bool) -> Result<Box<RawValue>, CliError> {
    if !text_only && let Ok(value) = serde_json::from_str::<&RawValue>(text) {
        return Ok(value.to_owned());
    }
    let text = text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text));
    serde_json::value::to_raw_value(text)
        .map_err(|error| CliError::failed(format!("the message cannot be written as JSON: {error}")))
}

/// Asks before something that cannot be undone. Only where a person can answer: a script has decided already.
///
/// # Errors
/// When the answer is not yes.
pub(crate) fn confirm(question: &str) -> Result<(), CliError> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Ok(());
    }
    let mut answer = String::new();
    let asked = write!(io::stderr(), "{question} [y/N] ").and_then(|()| io::stdin().read_line(&mut answer));
    match asked {
        Ok(_) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        _ => Err(CliError::failed("nothing was done; answer y, or pass --yes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(text: &str) -> Given {
        let bytes: Box<dyn Read + Send> = Box::new(Cursor::new(text.as_bytes().to_vec()));
        tell_apart(Input { reader: BufReader::new(bytes), bytes: None }).expect("readable")
    }

    fn one(text: &str) -> String {
        match given(text) {
            Given::One(value) => value.get().to_owned(),
            Given::Lines(_) => panic!("taken for lines: {text}"),
        }
    }

    #[test]
    fn json_stays_as_it_is_and_anything_else_becomes_a_string() {
        for (text, json) in [
            ("{\"b\": 1.0,  \"a\":2}", "{\"b\": 1.0,  \"a\":2}"),
            (" 1e3 ", "1e3"),
            ("hello", "\"hello\""),
            ("say \"x\"", "\"say \\\"x\\\"\""),
            ("", "\"\""),
        ] {
            assert_eq!(to_json(text, false).expect("can be").get(), json);
        }
        assert_eq!(to_json("42", true).expect("can be").get(), "\"42\"");
    }

    #[test]
    fn one_value_may_span_lines_and_many_values_are_lines() {
        assert_eq!(one("{\n \"a\": 1\n}\n"), "{\n \"a\": 1\n}");
        assert_eq!(one("\n{\"a\":1}\n\n"), "{\"a\":1}");
        assert_eq!(one("hello\nworld\n"), "\"hello\\nworld\"");
        assert_eq!(one(""), "\"\"");
        let Given::Lines(mut input) = given("{\"a\":1}\n\n{\"a\":2}\n3\n") else { panic!("taken for one value") };
        let mut all = String::new();
        input.reader.read_to_string(&mut all).expect("readable");
        assert_eq!(all, "{\"a\":1}\n\n{\"a\":2}\n3\n", "nothing that was looked at is lost");
    }
}

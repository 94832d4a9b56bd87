//! Lines of a file or stdin, read by a thread of their own, so that waiting for input and waiting for the router do
//! not stop each other. Bounded: the thread runs at most two chunks ahead.

use std::io::{BufRead as _, BufReader, Read};

use tokio::sync::mpsc;

/// Longest line, in bytes: more than the longest message that a router can be set to take in practice.
const LINE_BYTES_MAX: usize = 64 << 20;

/// Chunks read ahead.
const CHUNKS_AHEAD: usize = 2;

/// Bytes after which a chunk is full; one line more may fit.
const CHUNK_BYTES: usize = 1 << 20;

/// A line that is not blank.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// Counted from 1, blank lines included, as an editor does.
    pub(crate) number: u64,
    /// Without its line break.
    pub(crate) text: Vec<u8>,
}

/// Lines that came together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// At most as many as asked for.
    pub(crate) lines: Vec<Line>,
    /// Bytes of input that they and the blank lines among them took.
    pub(crate) bytes: u64,
}

/// Reads lines in the background. A chunk has at most `lines_max` lines, and fewer when more would mean waiting: what
/// trickles in goes out at once, what is there goes out in full chunks. The channel closes at the end, or after an
/// error in words.
pub(crate) fn read_in_background<R: Read + Send + 'static>(
    mut reader: BufReader<R>,
    lines_max: usize,
) -> mpsc::Receiver<Result<Chunk, String>> {
    let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
    std::thread::spawn(move || {
        let mut number = 0;
        loop {
            let next = read_chunk(&mut reader, lines_max, &mut number);
            let is_last = !matches!(&next, Ok(Some(_)));
            let sent = match next.transpose() {
                Some(chunk) => sender.blocking_send(chunk),
                None => Ok(()),
            };
            if is_last || sent.is_err() {
                return;
            }
        }
    });
    receiver
}

fn read_chunk<R: Read>(reader: &mut BufReader<R>, lines_max: usize, number: &mut u64) -> Result<Option<Chunk>, String> {
    let mut chunk = Chunk::default();
    loop {
        let mut text = Vec::new();
        let read = reader
            .by_ref()
            .take(LINE_BYTES_MAX as u64)
            .read_until(b'\n', &mut text)
            .map_err(|error| format!("cannot read line {}: {error}", *number + 1))?;
        if read == 0 {
            return Ok((!chunk.lines.is_empty()).then_some(chunk));
        }
        *number += 1;
        chunk.bytes += read as u64;
        if read == LINE_BYTES_MAX && !text.ends_with(b"\n") {
            return Err(format!("line {number} is longer than {} MiB", LINE_BYTES_MAX >> 20));
        }
        text.truncate(text.trim_ascii_end().len());
        if !text.is_empty() {
            chunk.lines.push(Line { number: *number, text });
        }
        let more_is_here = reader.buffer().contains(&b'\n');
        let is_full = chunk.lines.len() >= lines_max || chunk.bytes >= CHUNK_BYTES as u64;
        if !chunk.lines.is_empty() && (is_full || !more_is_here) {
            return Ok(Some(chunk));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hands out one piece a read, as a pipe does.
    struct Pieces(Vec<&'static [u8]>);
    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            if self.0.is_empty() {
                return Ok(0);
            }
            let piece = self.0.remove(0);
            buffer[..piece.len()].copy_from_slice(piece);
            Ok(piece.len())
        }
    }

    fn chunks(pieces: Vec<&'static [u8]>, lines_max: usize) -> Vec<Vec<(u64, String)>> {
        let mut receiver = read_in_background(BufReader::new(Pieces(pieces)), lines_max);
        let mut all = Vec::new();
        while let Some(chunk) = receiver.blocking_recv() {
            let lines = chunk.expect("readable").lines.into_iter();
            all.push(lines.map(|l| (l.number, String::from_utf8(l.text).expect("UTF-8"))).collect());
        }
        all
    }

    #[test]
    fn what_trickles_in_goes_out_at_once() {
        let all = chunks(vec![b"1\n2\n3", b"\n", b"\n\n4"], 10);
        let expected: Vec<Vec<(u64, String)>> =
            vec![vec![(1, "1".into()), (2, "2".into())], vec![(3, "3".into())], vec![(6, "4".into())]];
        assert_eq!(all, expected);
    }

    #[test]
    fn chunks_are_full_when_there_is_enough() {
        let all = chunks(vec![b"1\n2\n3\n4\n5\r\n"], 2);
        assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
        assert_eq!(all[2][0], (5, "5".into()));
    }
}

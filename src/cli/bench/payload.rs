//! The messages of the load, and the ledger that tells whether all of them arrived, each once.
//!
//! Every message carries its number at a fixed place, so that it costs nothing to write and little to find again.

use std::ops::Range;

use base64::Engine as _;

/// What stands before the number in a message; in an envelope it follows `"message":`.
const MARK: &[u8] = b"{\"bench\":\"";

/// Digits of a number.
const DIGITS: usize = 10;

/// Between the number and the filling, and at the end.
const PAD: &[u8] = b"\",\"pad\":\"";
const END: &[u8] = b"\"}";

/// Shortest message, in bytes.
pub(super) const MESSAGE_BYTES_MIN: usize = MARK.len() + DIGITS + PAD.len() + END.len();

/// Different fillings: random, so that nothing on the way can compress or share them.
const FILLINGS: usize = 64;

/// Writes requests full of messages.
pub(super) struct Payload {
    /// Whole messages with the number zero.
    messages: Vec<Vec<u8>>,
    before: Vec<u8>,
}

impl Payload {
    /// Messages of `bytes` bytes to `topic`.
    pub(super) fn new(topic: &str, bytes: usize) -> Self {
        let filling = |_| {
            let random: Vec<u8> = (0..bytes).map(|_| rand::random()).collect();
            let mut pad = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(random);
            pad.truncate(bytes.saturating_sub(MESSAGE_BYTES_MIN));
            [MARK, &[b'0'; DIGITS], PAD, pad.as_bytes(), END].concat()
        };
        Self {
            messages: (0..FILLINGS).map(filling).collect(),
            before: format!("{{\"topic\":\"{topic}\",\"message\":").into_bytes(),
        }
    }

    /// Appends the messages of these numbers to `body`, one a line.
    pub(super) fn write(&self, numbers: Range<u64>, body: &mut Vec<u8>) {
        for number in numbers {
            body.extend_from_slice(&self.before);
            let start = body.len() + MARK.len();
            body.extend_from_slice(&self.messages[(number % FILLINGS as u64) as usize]);
            let mut rest = number;
            for digit in body[start..start + DIGITS].iter_mut().rev() {
                *digit = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
            body.extend_from_slice(b"}\n");
        }
    }

    /// Bytes of a message.
    pub(super) fn message_bytes(&self) -> usize {
        self.messages[0].len()
    }
}

/// Calls `found` with the number of every message in a batch that was received, and the filling skipped.
pub(super) fn numbers(batch: &[u8], message_bytes: usize, mut found: impl FnMut(u64)) {
    let mut at = 0;
    while let Some(offset) = batch.get(at..).and_then(|rest| position(rest, MARK)) {
        let start = at + offset + MARK.len();
        let digits = batch.get(start..start + DIGITS).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| digits.parse().ok()) {
            Some(number) => {
                found(number);
                at = start + message_bytes - MARK.len();
            }
            None => at = start,
        }
    }
}

fn position(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// A set of numbers, one bit each.
#[derive(Debug, Default, Clone)]
struct Bits(Vec<u64>);

impl Bits {
    /// Adds it; false if it was there.
    fn insert(&mut self, number: u64) -> bool {
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        let was_there = self.0[word] & bit != 0;
        self.0[word] |= bit;
        !was_there
    }

    fn ones(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// What was sent and what arrived, in each of some inboxes.
#[derive(Debug)]
pub(super) struct Ledger {
    accepted: Bits,
    inboxes: Vec<Inbox>,
}

#[derive(Debug, Default, Clone)]
struct Inbox {
    arrived: Bits,
    count: u64,
    twice: u64,
}

impl Ledger {
    /// An empty one for so many inboxes, each of which must get everything.
    pub(super) fn new(inboxes: usize) -> Self {
        Self { accepted: Bits::default(), inboxes: vec![Inbox::default(); inboxes] }
    }

    /// The router said 202 to these.
    pub(super) fn accept(&mut self, numbers: Range<u64>) {
        for number in numbers {
            self.accepted.insert(number);
        }
    }

    /// This one was found in that inbox.
    pub(super) fn arrive(&mut self, inbox: usize, number: u64) {
        let inbox = &mut self.inboxes[inbox];
        if inbox.arrived.insert(number) {
            inbox.count += 1;
        } else {
            inbox.twice += 1;
        }
    }

    /// Different messages that arrived, over all inboxes.
    pub(super) fn arrived(&self) -> u64 {
        self.inboxes.iter().map(|inbox| inbox.count).sum()
    }

    /// The same in the inbox that is furthest behind.
    pub(super) fn slowest(&self) -> u64 {
        self.inboxes.iter().map(|inbox| inbox.count).min().unwrap_or(0)
    }

    /// Whether everything that was accepted has arrived everywhere: a count only, for the hot loop.
    pub(super) fn is_even(&self, accepted: u64) -> bool {
        self.inboxes.iter().all(|inbox| inbox.count >= accepted)
    }

    /// The judgement.
    ///
    /// # Errors
    /// What is missing, what came twice, what was never accepted.
    pub(super) fn verdict(&self) -> Result<String, String> {
        let accepted = self.accepted.ones();
        let (mut missing, mut twice, mut strange) = (0, 0, 0);
        for inbox in &self.inboxes {
            let common: u64 = (self.accepted.0.iter().zip(&inbox.arrived.0))
                .map(|(accepted, arrived)| u64::from((accepted & arrived).count_ones()))
                .sum();
            missing += accepted - common;
            strange += inbox.count - common;
            twice += inbox.twice;
        }
        if missing + twice + strange > 0 {
            return Err(format!("{missing} missing, {twice} twice, {strange} never accepted, of {accepted} accepted"));
        }
        Ok(match self.inboxes.len() {
            0 | 1 => format!("all {accepted} accepted arrived, each once"),
            many => format!("all {accepted} accepted arrived in each of {many} inboxes, each once"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_their_size_and_their_number() {
        let payload = Payload::new("a.b", 1024);
        let mut body = Vec::new();
        payload.write(98..102, &mut body);
        let lines: Vec<&[u8]> = body.split(|&b| b == b'\n').filter(|line| !line.is_empty()).collect();
        assert_eq!(lines.len(), 4);
        for line in &lines {
            let line: serde_json::Value = serde_json::from_slice(line).expect("JSON");
            assert_eq!(line["topic"], "a.b");
            assert_eq!(line["message"].to_string().len(), 1024);
        }
        let mut found = Vec::new();
        numbers(&body, payload.message_bytes(), |number| found.push(number));
        assert_eq!(found, [98, 99, 100, 101]);
        assert_eq!(Payload::new("a", 0).message_bytes(), MESSAGE_BYTES_MIN);
    }

    #[test]
    fn the_ledger_finds_what_is_missing_double_or_strange() {
        let mut ledger = Ledger::new(2);
        ledger.accept(0..100);
        for inbox in 0..2 {
            (0..100).for_each(|number| ledger.arrive(inbox, number));
        }
        assert!(ledger.is_even(100) && ledger.verdict().is_ok());
        ledger.arrive(0, 7);
        ledger.arrive(1, 1000);
        ledger.accept(100..101);
        assert_eq!(ledger.verdict(), Err("2 missing, 1 twice, 1 never accepted, of 101 accepted".into()));
    }
}

//! A connection to the store that ends when a reply is too long. The library collects a reply for as long as it comes, and whoever may publish to a
//! channel or set a value can make one of 512 MiB.
//!
//! Written by hand: the library has no limit for it. Replies are in the second version of Redis's protocol, which the connection asks for; the
//! third one's kinds end it too.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The longest reply. Lookups have a few KiB, and a server with many modules says as much of itself.
const MAX_REPLY_BYTES: usize = 64 * 1024;

/// A stream of replies, of which none is too long.
pub(super) struct LimitedReplies<S> {
    stream: S,
    reply: Reply,
}

/// Where in a reply the stream is.
#[derive(Debug)]
struct Reply {
    /// The bytes of this reply up to here.
    length: usize,
    /// How many values it still has to have. A list adds its own.
    missing: usize,
    next: Next,
}

/// What comes next.
#[derive(Debug, Clone, Copy)]
enum Next {
    /// The byte that says what kind of value follows.
    Kind,
    /// The rest of a line: a text, or the length of bytes or of a list.
    Line { is: Line, number: Option<usize>, is_none: bool, after_return: bool },
    /// So many bytes, with their line end.
    Bytes(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Text,
    Bytes,
    List,
}

// === impl Reply ===

impl Reply {
    const fn new() -> Self {
        Self { length: 0, missing: 1, next: Next::Kind }
    }

    /// Follows these bytes of the stream. `None` if a reply is too long, or none.
    fn follow(&mut self, mut bytes: &[u8]) -> Option<()> {
        while let Some((&byte, rest)) = bytes.split_first() {
            let taken = match &mut self.next {
                Next::Kind => {
                    let is = match byte {
                        b'+' | b'-' | b':' => Line::Text,
                        b'$' => Line::Bytes,
                        b'*' => Line::List,
                        _ => return None,
                    };
                    self.next = Next::Line { is, number: None, is_none: false, after_return: false };
                    1
                }
                Next::Bytes(left) => {
                    let taken = bytes.len().min(*left);
                    *left -= taken;
                    if *left == 0 {
                        self.end_value(0)?;
                    }
                    taken
                }
                Next::Line { is, number, is_none, after_return } => {
                    let ends = *after_return && byte == b'\n';
                    *after_return = byte == b'\r';
                    match (*is, byte) {
                        (Line::Text, _) | (_, b'\r') => {}
                        (_, b'-') if number.is_none() && !*is_none => *is_none = true,
                        (_, b'0'..=b'9') => {
                            let before = number.unwrap_or_default().checked_mul(10)?;
                            *number = Some(before.checked_add(usize::from(byte - b'0')).filter(|it| *it <= MAX_REPLY_BYTES)?);
                        }
                        (_, b'\n') if ends => {}
                        _ => return None,
                    }
                    if ends {
                        let (is, number) = (*is, if *is_none { None } else { *number });
                        match (is, number) {
                            (Line::Bytes, Some(number)) => self.next = Next::Bytes(number + LINE_END),
                            (Line::List, Some(number)) => self.end_value(number)?,
                            _ => self.end_value(0)?,
                        }
                    }
                    1
                }
            };
            self.length = self.length.checked_add(taken).filter(|length| *length <= MAX_REPLY_BYTES)?;
            if self.missing == 0 {
                *self = Self::new();
            }
            bytes = if taken == 1 { rest } else { bytes.get(taken..).unwrap_or_default() };
        }
        Some(())
    }

    /// A value has ended, and brought so many others.
    fn end_value(&mut self, others: usize) -> Option<()> {
        self.missing = (self.missing - 1).checked_add(others).filter(|missing| *missing <= MAX_REPLY_BYTES)?;
        self.next = Next::Kind;
        Some(())
    }
}

/// `\r\n`.
const LINE_END: usize = 2;

// === impl LimitedReplies ===

impl<S> LimitedReplies<S> {
    pub(super) const fn new(stream: S) -> Self {
        Self { stream, reply: Reply::new() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for LimitedReplies<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let read = buffer.filled().get(before..).unwrap_or_default();
        Poll::Ready(self.reply.follow(read).ok_or_else(|| {
            let what = format!("the server sends a reply of more than {MAX_REPLY_BYTES} bytes, or none of Redis");
            io::Error::new(io::ErrorKind::InvalidData, what)
        }))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LimitedReplies<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows the text whole, and byte by byte.
    fn follows(text: &[u8]) -> bool {
        let (mut whole, mut single) = (Reply::new(), Reply::new());
        let (whole, single) = (whole.follow(text), text.iter().try_for_each(|byte| single.follow(&[*byte])));
        assert_eq!(whole, single, "{:?}", text.get(..80));
        whole.is_some()
    }

    #[test]
    fn replies_of_any_number_pass_and_none_that_is_too_long() {
        let bulk = |length: usize| [format!("${length}\r\n").as_bytes(), &vec![b'\n'; length], b"\r\n"].concat();
        let usual = b"*6\r\n:1\r\n:0\r\n*2\r\n$1\r\nx\r\n$-1\r\n*-1\r\n*0\r\n-ERR no\r\n+OK\r\n$0\r\n\r\n";
        for good in [
            &usual.repeat(20_000),
            &bulk(60_000).repeat(50),
            b"+a\nb\rc\r\r\n:1\r\n".as_slice(),
            b"*2\r\n*1\r\n*1\r\n:1\r\n:2\r\n",
        ] {
            assert!(follows(good), "{:?}", good.get(..80));
        }
        for bad in [
            bulk(MAX_REPLY_BYTES + 1),
            bulk(MAX_REPLY_BYTES),
            [b"*2\r\n".as_slice(), &bulk(40_000), &bulk(40_000)].concat(),
            [b"*65000\r\n".as_slice(), &b":1\r\n".repeat(65_000)].concat(),
            b"*1\r\n".repeat(70_000),
            b"*40000\r\n*40000\r\n".to_vec(),
            [b"+".as_slice(), &b"x\n".repeat(40_000)].concat(),
            [b"-".as_slice(), &b"+OK\n".repeat(40_000)].concat(),
            [b"+OK\r\n$".as_slice(), &[b'0'; 70_000]].concat(),
            b"$536870912\r\n".to_vec(),
            b"$99999999999999999999999\r\n".to_vec(),
            b"$+5\r\n".to_vec(),
            b"$1 \r\n".to_vec(),
            b"$1\n".to_vec(),
            b"%1\r\n".to_vec(),
            b"garbage\r\n".to_vec(),
        ] {
            assert!(!follows(&bad), "{:?}", bad.get(..80));
        }
    }
}

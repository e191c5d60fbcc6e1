//! `Prefer: wait=<seconds>` (RFC 7240): how long a client is willing to wait for a lock.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};

/// The header with the client's preferences.
pub const PREFER: HeaderName = HeaderName::from_static("prefer");
/// The header that says which of them were followed.
pub const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// The wait that the client prefers, in whole seconds.
///
/// Of a preference that is given more than once the first counts (RFC 7240, section 2); one that cannot be read
/// is no preference. Numbers too large to count mean as long as possible.
pub fn preferred_wait(headers: &HeaderMap) -> Option<Duration> {
    let lines = headers
        .get_all(PREFER)
        .iter()
        .filter_map(|line| line.to_str().ok());
    let value = lines.flat_map(|line| split(line, ',')).find_map(|preference| {
        // What follows the first semicolon are parameters; `wait` has none.
        let main = split(preference, ';').next().unwrap_or_default();
        let (name, value) = main.split_once('=').unwrap_or((main, ""));
        name.trim().eq_ignore_ascii_case("wait").then(|| value.trim())
    })?;
    let digits = value
        .strip_prefix('"')
        .and_then(|value| value.strip_suffix('"'))
        .unwrap_or(value);
    let number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    // All digits: what does not parse is too large.
    number.then(|| Duration::from_secs(digits.parse().unwrap_or(u64::MAX)))
}

/// `Preference-Applied` for a wait that was followed, cut to whole seconds.
pub(crate) fn applied(wait: Duration) -> HeaderValue {
    // Digits and visible ASCII are a header value.
    HeaderValue::try_from(format!("wait={}", wait.as_secs()))
        .unwrap_or_else(|_| HeaderValue::from_static("wait=0"))
}

/// Splits at a separator outside of quoted strings.
fn split(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let (mut quoted, mut escaped) = (false, false);
        let end = text.find(|c| {
            let here = !quoted && c == separator;
            match c {
                _ if escaped => escaped = false,
                '\\' if quoted => escaped = true,
                '"' => quoted = !quoted,
                _ => {}
            }
            here
        });
        let (part, left) = match end {
            Some(end) => (&text[..end], Some(&text[end + separator.len_utf8()..])),
            None => (text, None),
        };
        rest = left;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(lines: &[&str]) -> Option<u64> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(PREFER, HeaderValue::from_bytes(line.as_bytes()).unwrap());
        }
        preferred_wait(&headers).map(|wait| wait.as_secs())
    }

    #[test]
    fn the_grammar_of_rfc_7240() {
        let some: [(&[&str], u64); 18] = [
            (&["wait=10"], 10),
            (&["wait=0"], 0),
            (&["WAIT=7"], 7),
            (&["Wait = 7"], 7),
            (&["wait=\"12\""], 12),
            (&["wait=007"], 7),
            (&["respond-async, wait=100"], 100),
            (&["return=minimal; foo=\"some parameter\", wait=3"], 3),
            (&["wait=3; foo=bar"], 3),
            (&["wait=3 ;foo"], 3),
            (&["respond-async", "wait=5"], 5),
            (&["wait=5", "wait=9"], 5),
            (&["wait=5, wait=9"], 5),
            (&["foo=\"a, wait=9\", wait=4"], 4),
            (&["foo=\"a\\\", wait=9\", wait=4"], 4),
            (&[", ,wait=2,"], 2),
            (&["foo=é", "wait=2"], 2),
            (&["wait=99999999999999999999999"], u64::MAX),
        ];
        for (lines, seconds) in some {
            assert_eq!(wait(lines), Some(seconds), "{lines:?}");
        }
        let none: [&[&str]; 15] = [
            &[],
            &[""],
            &["wait"],
            &["wait="],
            &["wait=\"\""],
            &["wait=-1"],
            &["wait=+1"],
            &["wait=1.5"],
            &["wait=1s"],
            &["wait=ten"],
            &["wait=\"5"],
            &["waiting=5"],
            &["foo=\"wait=5\""],
            &["foo; wait=5"],
            // The first instance counts, also when it cannot be read.
            &["wait=x, wait=5"],
        ];
        for lines in none {
            assert_eq!(wait(lines), None, "{lines:?}");
        }
    }

    #[test]
    fn what_was_applied_is_told_in_seconds() {
        assert_eq!(applied(Duration::from_millis(2_900)), "wait=2");
    }
}

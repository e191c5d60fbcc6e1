//! The page about statuses says of every code what the table of codes says.

use std::collections::BTreeSet;

use leasehold_http::Code;

const PAGE: &str = include_str!("../../../../docs/http-status.md");

/// Status, code and whether to try again, of each row of the page's table.
fn rows() -> Vec<(u16, String, bool)> {
    let cells = |line: &str| {
        line.split('|')
            .map(|cell| cell.trim().to_owned())
            .collect::<Vec<_>>()
    };
    PAGE.lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| status"))
        .map(cells)
        .map(|cells| {
            assert_eq!(cells.len(), 8, "six columns: {cells:?}");
            assert!(cells[4..7].iter().all(|cell| !cell.is_empty()), "{cells:?}");
            let retryable = match cells[3].as_str() {
                "yes" => true,
                "no" => false,
                other => panic!("{other:?} is neither yes nor no"),
            };
            let code = cells[2].trim_matches('`').to_owned();
            (cells[1].parse().unwrap(), code, retryable)
        })
        .collect()
}

#[test]
fn every_code_is_on_the_page_with_its_status_and_no_other_is() {
    let rows = rows();
    for code in Code::ALL {
        let row = (
            code.status().as_u16(),
            code.as_str().to_owned(),
            code.is_retryable(),
        );
        assert!(rows.contains(&row), "{row:?} is not in docs/http-status.md");
    }
    let (known, told): (BTreeSet<_>, BTreeSet<_>) = (
        Code::ALL.iter().map(|code| code.as_str()).collect(),
        rows.iter().map(|(_, code, _)| code.as_str()).collect(),
    );
    assert_eq!(known, told);
}

#[test]
fn a_code_has_one_row_but_for_invalid_requests_which_have_four() {
    for code in Code::ALL {
        let mut statuses: Vec<u16> = rows()
            .into_iter()
            .filter(|row| row.1 == code.as_str())
            .map(|row| row.0)
            .collect();
        statuses.sort_unstable();
        match code {
            Code::InvalidRequest => assert_eq!(statuses, [400, 413, 415, 422]),
            _ => assert_eq!(statuses, [code.status().as_u16()], "{code}"),
        }
    }
}

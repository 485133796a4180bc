use super::*;

fn parse(json: &str, data: u64) -> Result<Header, HeaderProblem> {
    Header::parse(json.as_bytes(), 8 + json.len() as u64 + data)
}

fn entry(name: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"BF16","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

fn of(entries: &[String]) -> String {
    format!("{{{}}}", entries.join(","))
}

#[test]
fn tensors_come_by_offset() {
    let json = of(&[
        entry("b", "[2,3]", 4, 16),
        entry("empty", "[0,7]", 16, 16),
        entry("a", "[2]", 0, 4),
        r#""__metadata__":{"format":"pt"}"#.to_owned(),
        entry("scalar", "[]", 16, 18),
    ]);
    let header = parse(&json, 18).unwrap();
    assert_eq!(header.metadata, Some(vec![("format".to_owned(), "pt".to_owned())]));
    assert_eq!(header.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["a", "b", "empty", "scalar"]);
    assert_eq!(header.data_start, 8 + json.len() as u64);
    // the padding that writers add to align the data
    assert_eq!(parse(&format!("{json}   "), 18).unwrap().entries.len(), 4);
}

#[test]
fn refuses_a_file_shorter_than_its_length_field() {
    assert_eq!(header_bytes([0; 8], 7), Err(HeaderProblem::TooShort { len: 7 }));
}

#[test]
fn refuses_a_header_of_more_than_100_mb() {
    let len = MAX_HEADER_BYTES + 1;
    assert!(matches!(header_bytes(len.to_le_bytes(), u64::MAX), Err(HeaderProblem::TooLong { .. })));
}

#[test]
fn refuses_the_wrong_byte_order() {
    assert!(matches!(header_bytes(64u64.to_be_bytes(), 1000), Err(HeaderProblem::TooLong { .. })));
}

#[test]
fn refuses_a_truncated_header() {
    assert_eq!(header_bytes(65u64.to_le_bytes(), 72), Err(HeaderProblem::Truncated { claimed: 65, found: 64 }));
    assert_eq!(header_bytes(64u64.to_le_bytes(), 72), Ok(64));
}

#[test]
fn refuses_what_is_not_a_json_object() {
    for json in ["", " {}", "[]", "null", "{", "{\"a\":1}", "{}x", r#"{"__metadata__":{"a":1}}"#] {
        assert!(matches!(parse(json, 0), Err(HeaderProblem::Syntax { .. })), "{json}");
    }
    assert!(
        matches!(Header::parse(b"{\"\xff\":1}", 20), Err(HeaderProblem::Syntax { .. })),
        "a name that is not UTF-8"
    );
}

#[test]
fn refuses_unknown_dtypes_and_negative_numbers() {
    for json in [
        r#"{"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"BF16","shape":[-2],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4,8]}}"#,
        r#"{"a":{"dtype":"BF16","dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"BF16","shape":[2]}}"#,
    ] {
        assert!(matches!(parse(json, 4), Err(HeaderProblem::Syntax { .. })), "{json}");
    }
}

#[test]
fn refuses_duplicate_names() {
    let json = of(&[entry("a", "[2]", 0, 4), entry("a", "[2]", 4, 8)]);
    assert_eq!(parse(&json, 8), Err(HeaderProblem::Duplicate { name: "a".to_owned() }));
    let json = r#"{"__metadata__":{"k":"1"},"__metadata__":{"k":"2"}}"#;
    assert!(matches!(parse(json, 0), Err(HeaderProblem::Syntax { .. })));
    assert!(matches!(parse(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0), Err(HeaderProblem::Syntax { .. })));
}

#[test]
fn refuses_shapes_that_overflow() {
    let json = of(&[entry("a", "[4294967296,4294967296,2]", 0, 0)]);
    assert!(matches!(parse(&json, 0), Err(HeaderProblem::Overflow { .. })));
    let json = of(&[entry("a", "[2305843009213693952]", 0, 0)]); // values fit 64 bits, their bits do not
    assert!(matches!(parse(&json, 0), Err(HeaderProblem::Overflow { .. })));
}

#[test]
fn refuses_offsets_that_do_not_fit_the_shape() {
    for (start, end) in [(0, 5), (0, 3), (4, 0), (u64::MAX, 3)] {
        let json = of(&[entry("a", "[2]", start, end)]);
        assert!(matches!(parse(&json, 4), Err(HeaderProblem::Size { .. })), "{start} {end}");
    }
}

#[test]
fn refuses_overlaps() {
    let json = of(&[entry("a", "[2]", 0, 4), entry("b", "[2]", 2, 6)]);
    assert_eq!(parse(&json, 6), Err(HeaderProblem::NotContiguous { name: "b".to_owned(), start: 2, expected: 4 }));
}

#[test]
fn refuses_holes() {
    let json = of(&[entry("a", "[2]", 0, 4), entry("b", "[2]", 6, 10)]);
    assert_eq!(parse(&json, 10), Err(HeaderProblem::NotContiguous { name: "b".to_owned(), start: 6, expected: 4 }));
    let json = of(&[entry("a", "[2]", 2, 6)]);
    assert!(matches!(parse(&json, 6), Err(HeaderProblem::NotContiguous { .. })));
}

#[test]
fn refuses_offsets_near_the_end_of_64_bits() {
    let json = of(&[entry("a", "[2]", u64::MAX - 4, u64::MAX)]);
    assert!(matches!(parse(&json, 4), Err(HeaderProblem::NotContiguous { .. })));
}

#[test]
fn refuses_a_file_that_is_too_long_or_too_short() {
    let json = of(&[entry("a", "[2]", 0, 4)]);
    assert_eq!(parse(&json, 3), Err(HeaderProblem::Length { expected: 4, found: 3 }));
    assert_eq!(parse(&json, 5), Err(HeaderProblem::Length { expected: 4, found: 5 }));
}

#[test]
fn refuses_values_that_do_not_fill_bytes() {
    let json = r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#;
    assert!(matches!(parse(json, 1), Err(HeaderProblem::Size { .. })));
}

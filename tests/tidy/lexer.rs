//! Reads Rust source closely enough to find words and paths in it: comments and literals do not count, use-trees are spread out.
//!
//! Not a parser: it looks for no meaning, and on source that does not compile it gives nonsense, but ends.

#[derive(Clone, Debug)]
pub struct Token {
    pub line: usize,
    pub text: String,
}

/// Words and punctuation, `::` as one token; comments and the insides of literals left out.
pub fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut tokens, mut line, mut i) = (Vec::new(), 1, 0);
    while i < chars.len() {
        let start = i;
        match chars[i] {
            '/' if at(i + 1) == '/' => i += chars[i..].iter().take_while(|c| **c != '\n').count(),
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                while i < chars.len() {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 {
                        break;
                    }
                }
            }
            '"' => i = after_string(&chars, i),
            '\'' if at(i + 1) == '\\' => i += 3 + chars[(i + 3).min(chars.len())..].iter().take_while(|c| **c != '\'').count() + 1,
            '\'' if at(i + 2) == '\'' => i += 3,
            '\'' => i += 1 + chars[i + 1..].iter().take_while(|c| is_word(**c)).count(), // a lifetime
            c if is_word(c) => {
                let word: String = chars[i..].iter().take_while(|c| is_word(**c)).collect();
                i += word.chars().count();
                let hashes = chars[i..].iter().take_while(|c| **c == '#').count();
                if ["r", "br", "cr"].contains(&word.as_str()) && at(i + hashes) == '"' {
                    i = after_raw_string(&chars, i + hashes + 1, hashes);
                } else {
                    tokens.push(Token { line, text: word });
                }
            }
            ':' if at(i + 1) == ':' => {
                tokens.push(Token { line, text: "::".to_owned() });
                i += 2;
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push(Token { line, text: c.to_string() });
                }
                i += 1;
            }
        }
        line += chars[start..i.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

fn after_string(chars: &[char], quote: usize) -> usize {
    let mut i = quote + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn after_raw_string(chars: &[char], start: usize, hashes: usize) -> usize {
    let closes = |i: usize| chars[i] == '"' && chars[i + 1..].iter().take_while(|c| **c == '#').count() >= hashes;
    (start..chars.len()).find(|i| closes(*i)).map_or(chars.len(), |i| i + 1 + hashes)
}

/// The tokens without the items under `#[cfg(test)]`.
pub fn without_test_items(tokens: Vec<Token>) -> Vec<Token> {
    let mut kept: Vec<Token> = Vec::new();
    let mut rest = tokens.as_slice();
    while let Some((first, after)) = rest.split_first() {
        if rest.iter().take(7).map(|token| token.text.as_str()).eq(["#", "[", "cfg", "(", "test", ")", "]"]) {
            rest = after_item(&rest[7..]);
        } else {
            kept.push(first.clone());
            rest = after;
        }
    }
    kept
}

fn after_item(tokens: &[Token]) -> &[Token] {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate() {
        match token.text.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth -= 1,
            _ => {}
        }
        if depth < 0 {
            return &tokens[i..];
        }
        if depth == 0 && (token.text == "}" || token.text == ";") {
            return &tokens[i + 1..];
        }
    }
    &[]
}

/// A path as written, use-trees spread out; `name` is what it is called here.
#[derive(Debug)]
pub struct UsedPath {
    pub line: usize,
    pub segments: Vec<String>,
    pub name: String,
}

pub fn paths(tokens: &[Token]) -> Vec<UsedPath> {
    let mut found = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        let next = i + 1;
        let starts_path = tokens.get(next).is_some_and(|token| token.text == "::") && is_name(&tokens[i].text);
        i = if starts_path { spread(tokens, i, &[], &mut found) } else { next };
    }
    found
}

fn is_name(text: &str) -> bool {
    text == "*" || text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Reads the path or use-tree at `i` below `prefix`; returns the index after it.
fn spread(tokens: &[Token], mut i: usize, prefix: &[String], found: &mut Vec<UsedPath>) -> usize {
    let text = |i: usize| tokens.get(i).map_or("", |token| token.text.as_str());
    let line = tokens[i].line;
    let mut segments = prefix.to_vec();
    loop {
        if text(i) == "{" {
            i += 1;
            while i < tokens.len() && text(i) != "}" {
                i = if is_name(text(i)) || text(i) == "{" { spread(tokens, i, &segments, found) } else { i + 1 };
            }
            return i + 1;
        }
        if !is_name(text(i)) {
            break; // a turbofish: the path ended before it
        }
        if text(i) != "self" || segments.is_empty() {
            segments.push(text(i).to_owned());
        }
        i += 1;
        if text(i) != "::" {
            break;
        }
        i += 1;
    }
    let renamed = text(i) == "as";
    let name = if renamed { text(i + 1).to_owned() } else { segments.last().cloned().unwrap_or_default() };
    found.push(UsedPath { line, segments, name });
    if renamed { i + 2 } else { i }
}

// Command apilist prints the exported declarations of packages without comments, so that a change of the API shows as a difference. ./api
// runs it.
package main

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"slices"
	"strings"
)

func main() {
	for _, folder := range os.Args[1:] {
		if err := list(folder); err != nil {
			fmt.Fprintln(os.Stderr, "apilist:", err)
			os.Exit(1)
		}
	}
}

func list(folder string) error {
	files := token.NewFileSet()
	packages, err := parser.ParseDir(files, folder, func(about fs.FileInfo) bool { return !strings.HasSuffix(about.Name(), "_test.go") }, 0)
	if err != nil {
		return err
	}
	var declared []string
	for name, parsed := range packages {
		fmt.Printf("\n=== %s (%s)\n", name, folder)
		for _, file := range parsed.Files {
			ast.FileExports(file)
			for _, declaration := range file.Decls {
				found, err := print(files, declaration)
				if err != nil {
					return err
				}
				declared = append(declared, found...)
			}
		}
	}
	// Two systems may declare the same.
	slices.Sort(declared)
	for _, one := range slices.Compact(declared) {
		fmt.Println(one)
	}
	return nil
}

func print(files *token.FileSet, declaration ast.Decl) ([]string, error) {
	var nodes []any
	prefix := ""
	switch declaration := declaration.(type) {
	case *ast.FuncDecl:
		if receiver := declaration.Recv; receiver != nil && !token.IsExported(strings.TrimPrefix(types.ExprString(receiver.List[0].Type), "*")) {
			return nil, nil
		}
		declaration.Body, declaration.Doc = nil, nil
		nodes = append(nodes, declaration)
	case *ast.GenDecl:
		if declaration.Tok == token.IMPORT {
			return nil, nil
		}
		prefix = declaration.Tok.String() + " "
		for _, spec := range declaration.Specs {
			nodes = append(nodes, spec)
		}
	}
	var printed []string
	for _, node := range nodes {
		var text bytes.Buffer
		if err := printer.Fprint(&text, files, node); err != nil {
			return nil, err
		}
		printed = append(printed, prefix+text.String())
	}
	return printed, nil
}
